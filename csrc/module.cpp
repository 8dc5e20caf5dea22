// The Python binding. Eager calls come this way; compiled ones find the same operators under torch.ops.

#include <ATen/core/Reduction.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <sstream>
#include <string_view>

#include "backends.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/large_memory.h"
#include "ops.h"

namespace py = pybind11;

namespace {

std::string type_name(py::handle object) {
  return Py_TYPE(object.ptr())->tp_name;
}

constexpr int kByName = 0;  // the position of an argument that has none

[[noreturn]] void wrong_type(const char* name, int position, const char* expected, py::handle object) {
  const std::string where = position == kByName ? "" : " (position " + std::to_string(position) + ")";
  throw py::type_error("cross_entropy_loss(): argument '" + std::string(name) + "'" + where + " must be " + expected +
                       ", not " + type_name(object));
}

const at::Tensor& tensor(py::handle object, const char* name, int position = kByName) {
  if (!THPVariable_Check(object.ptr())) {
    wrong_type(name, position, "Tensor", object);
  }
  return THPVariable_Unpack(object.ptr());
}

int64_t integer(py::handle object, const char* name, int position = kByName) {
  if (!PyLong_Check(object.ptr())) {
    wrong_type(name, position, "int", object);
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  if (overflow != 0) {
    throw py::value_error("Overflow when unpacking long long");
  }
  return value;
}

double number(py::handle object, const char* name, int position = kByName) {
  if (!PyFloat_Check(object.ptr()) && !PyLong_Check(object.ptr())) {
    wrong_type(name, position, "float", object);
  }
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) {
    throw py::error_already_set();
  }
  return value;
}

bool is_true(py::handle object) {
  return object.ptr() == Py_True;
}

template <typename Convert>
auto if_given(Convert convert, py::handle object, const char* name, int position = kByName)
    -> std::optional<std::decay_t<decltype(convert(object, name, position))>> {
  if (object.is_none()) {
    return std::nullopt;
  }
  return convert(object, name, position);
}

struct Arguments {
  at::Tensor logits, target;
  ce::OptionalTensor weight;
  int64_t ignore_index;
  double label_smoothing;

  Arguments(py::handle input, py::handle target_, py::handle weight_, py::handle ignore_index_,
            py::handle label_smoothing_)
      : logits(tensor(input, "input", 1)),
        target(tensor(target_, "target", 2)),
        weight(if_given(tensor, weight_, "weight", 3)),
        ignore_index(integer(ignore_index_, "ignore_index", 5)),
        label_smoothing(number(label_smoothing_, "label_smoothing", 6)) {}
};

at::Tensor loss(const ce::Inputs& in, bool inplace) {
  const py::gil_scoped_release no_gil;
  return inplace ? ce::cross_entropy_(in) : ce::cross_entropy(in);
}

at::Tensor cross_entropy(py::handle input, py::handle target, py::handle weight, int64_t reduction,
                         py::handle ignore_index, py::handle label_smoothing, bool inplace) {
  HANDLE_TH_ERRORS
  const Arguments a(input, target, weight, ignore_index, label_smoothing);
  return loss({a.logits, a.target, a.weight, {reduction, a.ignore_index, a.label_smoothing}}, inplace);
  END_HANDLE_TH_ERRORS_PYBIND
}

// What torch's loss does not have, by the names that the operators' schemas give it.
struct Named {
  ce::Options options;
  ce::OptionalTensor row_weight, logit_scale, divisor, picked;

  Named(const Arguments& a, int64_t reduction, const py::dict& arguments)
      : options{reduction, a.ignore_index, a.label_smoothing} {
    for (const auto& [key, value] : arguments) {
      set(PyUnicode_AsUTF8(key.ptr()), value);
    }
  }

  ce::Inputs inputs(const Arguments& a) const {
    return {a.logits, a.target, a.weight, options, row_weight, logit_scale, divisor, picked};
  }

 private:
  void set(std::string_view name, py::handle value) {
    const char* const who = name.data();
    if (name == "z_loss") {
      options.z_loss = number(value, who);
    } else if (name == "softcap") {
      options.softcap = if_given(number, value, who);
    } else if (name == "logit_scale") {
      options.logit_scale = number(value, who);
    } else if (name == "logit_scale_tensor") {
      logit_scale = tensor(value, who);
    } else if (name == "row_weight") {
      row_weight = if_given(tensor, value, who);
    } else if (name == "divisor") {
      options.divisor = if_given(number, value, who);
    } else if (name == "divisor_tensor") {
      divisor = tensor(value, who);
    } else if (name == "valid_classes") {
      options.valid_classes = if_given(integer, value, who);
    } else if (name == "zero_if_empty") {
      options.zero_if_empty = is_true(value);
    } else if (name == "full_precision") {
      options.full_precision = is_true(value);
    } else if (name == "divergence") {
      options.divergence = integer(value, who);
    } else if (name == "reverse") {
      options.reverse = is_true(value);
    } else if (name == "teacher_scale") {
      options.teacher_scale = number(value, who);
    } else if (name == "picked") {
      picked = tensor(value, "probabilities");
    } else if (name == "spreads") {
      options.spreads = is_true(value);
    } else {
      throw py::type_error("cross_entropy_loss() got an unexpected keyword argument '" + std::string(name) + "'");
    }
  }
};

at::Tensor cross_entropy_with_options(py::handle input, py::handle target, py::handle weight, int64_t reduction,
                                      py::handle ignore_index, py::handle label_smoothing, bool inplace,
                                      const py::dict& arguments) {
  HANDLE_TH_ERRORS
  const Arguments a(input, target, weight, ignore_index, label_smoothing);
  const Named named(a, reduction, arguments);
  return loss(named.inputs(a), inplace);
  END_HANDLE_TH_ERRORS_PYBIND
}

ce::Stats stats(int64_t outputs, py::handle logits, py::handle target, py::handle weight, py::handle ignore_index,
                py::handle label_smoothing, const py::dict& arguments) {
  HANDLE_TH_ERRORS
  const bool has_target = !target.is_none();
  Arguments a(logits, has_target ? target : logits, weight, ignore_index, label_smoothing);
  if (!has_target) {  // nothing depends on it, so any will do
    a.target = at::zeros_like(a.logits.select(ce::class_dim(a.logits), 0), at::kLong);
  }
  const Named named(a, at::Reduction::None, arguments);
  const py::gil_scoped_release no_gil;
  return ce::op::stats(outputs, named.inputs(a).of_rows());
  END_HANDLE_TH_ERRORS_PYBIND
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> row_stats(py::handle logits, py::handle target, py::handle weight,
                                                         py::handle ignore_index, py::handle label_smoothing) {
  HANDLE_TH_ERRORS
  const Arguments a(logits, target, weight, ignore_index, label_smoothing);
  py::gil_scoped_release no_gil;
  return ce::row_stats(a.logits, a.target, a.weight, a.ignore_index, a.label_smoothing);
  END_HANDLE_TH_ERRORS_PYBIND
}

void check_overwritable(const at::Tensor& logits) {
  HANDLE_TH_ERRORS
  ce::check_overwritable(logits);
  END_HANDLE_TH_ERRORS_PYBIND
}

void check_errors() {
  HANDLE_TH_ERRORS
  py::gil_scoped_release no_gil;
  ce::check_errors();
  END_HANDLE_TH_ERRORS_PYBIND
}

// The fields of Python's BuildInfo after the package's version. setup.py defines CE_NVCC and CE_ARCHITECTURES.
using BuildInfo =
    std::tuple<std::string, std::string, std::optional<std::string>, std::vector<std::string>, bool, std::string>;

BuildInfo build_info() {
#ifdef __clang__
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  std::optional<std::string> nvcc;
  std::vector<std::string> architectures;
#ifdef CE_NVCC
  nvcc = CE_NVCC;
  std::istringstream list(CE_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ';');) {
    architectures.push_back(name);
  }
#endif
#ifdef CE_EMULATE
  constexpr bool emulated = true;
#else
  constexpr bool emulated = false;
#endif
  return {TORCH_VERSION, compiler, nvcc, architectures, emulated, ce::cpu::isa_name()};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("cross_entropy_with_options", &cross_entropy_with_options);
  m.def("row_stats", &row_stats);
  m.def("stats", &stats);
  m.def("check_overwritable", &check_overwritable);
  m.def("check_errors", &check_errors);
  m.def("release_memory", &ce::cpu::release_large, py::call_guard<py::gil_scoped_release>());
  m.def("build_info", &build_info);
}
