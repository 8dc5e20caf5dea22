// The Python binding. Eager calls come this way; compiled ones find the same operators under torch.ops.

#include <ATen/core/Reduction.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <sstream>

#include "backends.h"
#include "cpu/isa.h"
#include "cpu/large_memory.h"
#include "ops.h"

namespace py = pybind11;

namespace {

std::string type_name(py::handle object) {
  return Py_TYPE(object.ptr())->tp_name;
}

[[noreturn]] void wrong_type(const char* name, int position, const char* expected, py::handle object) {
  throw py::type_error("cross_entropy_loss(): argument '" + std::string(name) + "' (position " +
                       std::to_string(position) + ") must be " + expected + ", not " + type_name(object));
}

const at::Tensor& tensor(py::handle object, const char* name, int position) {
  if (!THPVariable_Check(object.ptr())) {
    wrong_type(name, position, "Tensor", object);
  }
  return THPVariable_Unpack(object.ptr());
}

int64_t integer(py::handle object, const char* name, int position) {
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

double number(py::handle object, const char* name, int position) {
  if (!PyFloat_Check(object.ptr()) && !PyLong_Check(object.ptr())) {
    wrong_type(name, position, "float", object);
  }
  return PyFloat_AsDouble(object.ptr());
}

ce::OptionalTensor optional_tensor(py::handle object, const char* name, int position) {
  return object.is_none() ? std::nullopt : ce::OptionalTensor(tensor(object, name, position));
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
        weight(optional_tensor(weight_, "weight", 3)),
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

// With what torch's loss does not have.
at::Tensor cross_entropy_with_options(py::handle input, py::handle target, py::handle weight, int64_t reduction,
                                      py::handle ignore_index, py::handle label_smoothing, bool inplace,
                                      bool full_precision, py::handle row_weight, py::handle logit_scale_tensor,
                                      py::handle divisor_tensor, double z_loss, std::optional<double> softcap,
                                      double logit_scale, std::optional<double> divisor,
                                      std::optional<int64_t> valid_classes, bool zero_if_empty, int64_t divergence,
                                      bool reverse, double teacher_scale, py::handle picked, bool spreads) {
  HANDLE_TH_ERRORS
  const Arguments a(input, target, weight, ignore_index, label_smoothing);
  const ce::OptionalTensor of_rows = optional_tensor(row_weight, "row_weight", 7);
  const ce::OptionalTensor scale = optional_tensor(logit_scale_tensor, "logit_scale", 8);
  const ce::OptionalTensor by = optional_tensor(divisor_tensor, "divisor", 9);
  const ce::OptionalTensor of_picks = optional_tensor(picked, "probabilities", 10);
  return loss({a.logits,
               a.target,
               a.weight,
               {reduction, a.ignore_index, a.label_smoothing, full_precision, z_loss, softcap, logit_scale, divisor,
                valid_classes, zero_if_empty, divergence, reverse, teacher_scale, 0, std::nullopt, spreads},
               of_rows,
               scale,
               by,
               of_picks},
              inplace);
  END_HANDLE_TH_ERRORS_PYBIND
}

ce::Stats stats(int64_t outputs, py::handle logits, py::handle target, py::handle weight, py::handle ignore_index,
                py::handle label_smoothing, py::handle logit_scale_tensor, double z_loss, std::optional<double> softcap,
                double logit_scale, std::optional<int64_t> valid_classes) {
  HANDLE_TH_ERRORS
  const Arguments a(logits, target, weight, ignore_index, label_smoothing);
  const ce::OptionalTensor scale = optional_tensor(logit_scale_tensor, "logit_scale", 6);
  const py::gil_scoped_release no_gil;
  return ce::op::stats(outputs, {a.logits,
                                 a.target,
                                 a.weight,
                                 {at::Reduction::None, a.ignore_index, a.label_smoothing, /*full_precision=*/true,
                                  z_loss, softcap, logit_scale, std::nullopt, valid_classes},
                                 ce::kNoTensor,
                                 scale});
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
  m.def("check_errors", &check_errors);
  m.def("release_memory", &ce::cpu::release_large, py::call_guard<py::gil_scoped_release>());
  m.def("build_info", &build_info);
}
