// The gradients from what the forward pass has left of each row, in one read of the logits and one write.

#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {
namespace {

template <typename A>
CE_DEVICE MaxSum<A> exps_of(const Problem& p, int64_t row) {
  const int64_t offset = row_offset(p, row, p.row_strides);
  return {static_cast<const A*>(p.max)[offset], static_cast<const A*>(p.sum)[offset]};
}

// Σ of the coefficients of a row's classes, but for that of an index.
template <typename Walk>
CE_DEVICE Acc<typename Walk::Element> sum_of_coefficients(const Plan& plan, const Walk& walk,
                                                          const Coefficients<typename Walk::Element>& coefficients,
                                                          int lane) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  RowState<A> state;
  const auto nothing = [](int64_t, int) { return Piece<T, Walk::kSize>(); };
  for_each_piece<1>(walk, lane, plan.lanes, nothing, [&](int64_t c, const auto& piece) {
    A a[std::decay_t<decltype(piece)>::kSize];
    coefficients.read(c, a);
    for (const A coefficient : a) {
      state.coefficients += coefficient;
    }
  });
  return sum_in_block<Walk, true>(state, plan, static_cast<RowState<A>*>(shared_memory())).coefficients;
}

template <typename Walk, bool kLinear>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2>)
    logits_gradient(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  const Seat seat = Walk::seat(plan);
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const RowTarget<A> target = exists ? RowTarget<A>(p, index_of(p, row)) : RowTarget<A>();
    const bool kept = target.kept || p.grad_lse.data;  // an ignored row has no loss, but a log-sum-exp
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, exists ? p.classes : 0);
    const Coefficients<T> coefficients(p, row);
    A sum = target.coefficient;
    if constexpr (kLinear) {
      sum += sum_of_coefficients(plan, walk, coefficients, seat.lane);
    }
    const RowGradient<A> gradient = make_row_gradient<A>(
        exps_of<A>(p, row), sum, target.kept ? upstream_of<A>(p, row) : A(0), upstream_lse_of<A>(p, row));
    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride);
    const auto read = [&](int64_t c, int) {
      return kept ? walk.template read<Walk::kSize>(c) : Piece<T, Walk::kSize>();
    };
    for_each_piece<kLinear ? 2 : Walk::kBatch>(
        walk, seat.block * plan.lanes + seat.lane, int64_t{plan.blocks} * plan.lanes, read,
        [&](int64_t c, const auto& piece) {
          write_gradient<kLinear>(grad, c, piece, kept, target, coefficients, gradient);
        });
  }
}

// upstream · (1 − ε) · w_c · (lse − z_c), the gradient of the probabilities.
template <typename Walk>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2>)
    target_gradient(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  const Seat seat = Walk::seat(plan);
  const A keep = smoothing_of<A>(p).keep;
  for (int64_t row = first_row(plan) + seat.row; row < p.rows; row += row_step(plan)) {
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, p.classes);
    const MaxSum<A> exps = exps_of<A>(p, row);
    const A log_sum = exps.log_sum();
    const A factor = upstream_of<A>(p, row) * keep;
    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride);
    for_each_piece(walk, seat.block * plan.lanes + seat.lane, int64_t{plan.blocks} * plan.lanes,
                   [&](int64_t c, const auto& piece) {
                     constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
                     A values[kSize];
                     unpack(piece, values);
                     for (int i = 0; i < kSize; ++i) {
                       values[i] = factor * class_weight<A>(p, c + i) * (log_sum - (values[i] - exps.max));
                     }
                     grad.write(c, pack<T, kSize>(values));
                   });
  }
}

constexpr int kWeightBlock = 256;     // classes, a thread each
constexpr int64_t kWeightParts = 64;  // of the rows, at most

int64_t weight_parts(const Problem& p) {
  return std::min(p.rows, kWeightParts);
}

// Σ upstream · q'_c · (lse − z_c) over each block's part of the rows, the gradient of the class weights.
template <typename T>
__global__ void __launch_bounds__(kWeightBlock)
    weight_gradient(const __grid_constant__ Problem p, const __grid_constant__ int64_t parts) {
  using A = Acc<T>;
  const Smoothing<A> smoothing = smoothing_of<A>(p);
  const int64_t blocks = (p.classes + kWeightBlock - 1) / kWeightBlock;
  const int64_t part = blockIdx.x / blocks;
  const int64_t c = blockIdx.x % blocks * kWeightBlock + threadIdx.x;
  if (c >= p.classes) {
    return;
  }
  double sum = 0;
  for (int64_t row = part; row < p.rows; row += parts) {
    const auto element = [&](const Input& operand) {
      return A(to_accumulator(
          static_cast<const T*>(operand.data)[row_offset(p, row, operand.strides) + c * operand.class_stride]));
    };
    const MaxSum<A> exps = exps_of<A>(p, row);
    const A q = smoothing.coefficient(A(1), element(p.target));
    sum += upstream_of<A>(p, row) * q * (exps.log_sum() - (element(p.logits) - exps.max));
  }
  static_cast<double*>(p.workspace)[part * p.classes + c] = sum;
}

template <typename A>
__global__ void __launch_bounds__(kWeightBlock)
    sum_weight_parts(const __grid_constant__ Problem p, const __grid_constant__ int64_t parts) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWeightBlock + threadIdx.x;
  if (c >= p.classes) {
    return;
  }
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) {
    sum += static_cast<const double*>(p.workspace)[part * p.classes + c];
  }
  static_cast<A*>(p.grad.data)[c] = static_cast<A>(sum);
}

// Calls f with the walk that the logits' layout asks for.
template <typename F>
void dispatch_walk(const Problem& p, F&& f) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    walks_along(p) ? f(static_cast<Along<T>*>(nullptr)) : f(static_cast<Across<T>*>(nullptr));
  });
}

}  // namespace

void map_gradient(const Problem& p, const Plan& plan, Stream stream) {
  dispatch_walk(p, [&](auto* type) {
    using Walk = std::remove_pointer_t<decltype(type)>;
    Grid grid{blocks_for(p, plan), plan.threads};
    if (has_coefficients(p)) {
      grid.shared = shared_states<Walk>(plan) * sizeof(RowState<Acc<typename Walk::Element>>);
      launch(logits_gradient<Walk, true>, grid, stream, p, plan);
    } else {
      launch(logits_gradient<Walk, false>, grid, stream, p, plan);
    }
  });
}

void backward(const Problem& p, const Plan& plan, Stream stream) {
  if (p.divides_by_weight) {
    sum_rows(p, /*losses=*/false, stream);
  }
  map_gradient(p, plan, stream);
}

void backward(const Problem& p, Stream stream) {
  backward(p, plan_backward(p, current_device()), stream);
}

void target_backward(const Problem& p, Stream stream) {
  const Plan plan = plan_backward(p, current_device());
  dispatch_walk(p, [&](auto* type) {
    launch(target_gradient<std::remove_pointer_t<decltype(type)>>, {blocks_for(p, plan), plan.threads}, stream, p,
           plan);
  });
}

int64_t weight_backward_workspace_size(const Problem& p) {
  return weight_parts(p) * p.classes * sizeof(double);
}

void weight_backward(const Problem& p, Stream stream) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = (p.classes + kWeightBlock - 1) / kWeightBlock;
    const int64_t parts = std::min(weight_parts(p), kMaxBlocks / blocks);
    launch(weight_gradient<T>, {blocks * parts, kWeightBlock}, stream, p, parts);
    launch(sum_weight_parts<Acc<T>>, {blocks, kWeightBlock}, stream, p, parts);
  });
}

}  // namespace ce::cuda
