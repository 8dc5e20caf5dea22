// The gradients from what the forward pass has left of each row, in one read of the logits and one write.

#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {
namespace {

// Σ of the coefficients of a row's classes, but for that of an index.
template <typename Walk>
CE_DEVICE Acc<typename Walk::Element> sum_of_coefficients(const Plan& plan, const Walk& walk,
                                                          const Coefficients<typename Walk::Element>& coefficients,
                                                          const Seat& seat) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  RowState<A> state;
  const auto nothing = [](int64_t, int) { return Piece<T, Walk::kSize>(); };
  Seat of_block = seat;  // each block sums up the whole row
  of_block.rank = seat.lane;
  of_block.bits = log2_of(plan.lanes);
  for_each_piece<1>(walk, of_block, nothing, [&](int64_t c, const auto& piece) {
    A a[std::decay_t<decltype(piece)>::kSize];
    coefficients.read(c, a);
    for (const A coefficient : a) {
      state.coefficients += coefficient;
    }
  });
  return sum_in_block<Walk, true>(state, plan, static_cast<RowState<A>*>(shared_memory())).coefficients;
}

template <bool kGeneral, typename Walk, typename A = Acc<typename Walk::Element>>
CE_DEVICE RowGradient<A> gradient_of_row(const Problem& p, const Plan& plan, int64_t row, const RowTarget<A>& target,
                                         const Walk& walk, const Coefficients<typename Walk::Element>& coefficients,
                                         const Seat& seat) {
  A sum = target.coefficient;
  if (kGeneral && p.picks > 0) {
    sum = target.kept ? Picks<A>(p, row).row.coefficients(p.classes) : A(0);
  } else if (p.coefficients) {
    sum = static_cast<const A*>(p.coefficients)[row_offset(p, row, p.row_strides)];
  } else if constexpr (kGeneral) {
    sum += sum_of_coefficients(plan, walk, coefficients, seat);
  }
  RowUpstream<A> upstream = upstream_of_row(p, row, target);
  A entropy = 0;
  if constexpr (kGeneral) {
    upstream.log_prob = target.kept ? row_value<A>(p, p.grad_log_prob, row, 0) : A(0);
    upstream.entropy = row_value<A>(p, p.grad_entropy, row, 0);
    entropy = p.entropy ? static_cast<const A*>(p.entropy)[row_offset(p, row, p.row_strides)] : A(0);
  }
  const auto gradient = make_row_gradient<A>(exps_of<A>(p, row), sum, A(p.z_loss), upstream, entropy);
  return kGeneral && p.picks > 0 && target.kept ? Picks<A>(p, row).row.gradient_of_others(gradient) : gradient;
}

template <typename Walk, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2 * kGeneral>)
    logits_gradient(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  wait_for_previous();
  using T = typename Walk::Element;
  using A = Acc<T>;
  const LogitTransform<A> transform = transform_of<A>(p);
  const Seat seat = Walk::seat(plan);
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const RowTarget<A> target = exists ? target_of<kGeneral, A>(p, row, index_of(p, row)) : RowTarget<A>();
    const bool kept = target.kept || reaches_ignored_rows(p);
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, exists ? p.classes : 0);
    const Coefficients<T> coefficients(p, row, walk);
    const RowGradient<A> gradient = gradient_of_row<kGeneral>(p, plan, row, target, walk, coefficients, seat);
    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                            walk);
    if (!kept) {
      write_zeros(walk, seat, grad);
      continue;
    }
    const FromMemory<Walk> read{walk};
    write_row<kGeneral, kGeneral ? 2 : 3>(walk, seat, read, target, coefficients, transform, gradient, grad);
  }
}

// upstream · (1 − ε) · w_c · (lse − z_c), the gradient of the probabilities.
template <typename Walk>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2>)
    target_gradient(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  const Seat seat = Walk::seat(plan);
  const LogitTransform<A> transform = transform_of<A>(p);
  const A keep = smoothing_of<A>(p).keep;
  for (int64_t row = first_row(plan) + seat.row; row < p.rows; row += row_step(plan)) {
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, p.classes);
    const MaxSum<A> exps = exps_of<A>(p, row);
    const A log_sum = exps.log_sum();
    const A factor = upstream_of<A>(p, row) * keep;
    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                            walk);
    for_each_piece(walk, seat, [&](int64_t c, const auto& piece) {
      constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
      A values[kSize];
      unpack_logits<true>(piece, transform, values);
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
  const LogitTransform<A> transform = transform_of<A>(p);
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
    const A z = apply(transform, element(p.logits));
    sum += upstream_of<A>(p, row) * q * (exps.log_sum() - (z - exps.max));
  }
  p.partial_sums[part * p.classes + c] = sum;
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
    sum += p.partial_sums[part * p.classes + c];
  }
  static_cast<A*>(p.grad.data)[c] = static_cast<A>(sum);
}

constexpr int64_t kScaleBlocks = 1024;  // at most
constexpr int kScaleWarps = kMaxThreads / kWarp;

// Σ ∂loss/∂z_c · ∂z_c/∂scale, each warp's part.
template <typename Walk>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2>)
    logit_scale_gradient(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  const LogitTransform<A> transform = transform_of<A>(p);
  const Seat seat = Walk::seat(plan);
  double total = 0;
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const RowTarget<A> target = exists ? target_of<true, A>(p, row, index_of(p, row)) : RowTarget<A>();
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, exists ? p.classes : 0);
    const bool kept = exists && (target.kept || reaches_ignored_rows(p));
    const Coefficients<T> coefficients(p, row, walk);
    const RowGradient<A> gradient = gradient_of_row<true>(p, plan, row, target, walk, coefficients, seat);
    if (!kept) {
      continue;
    }
    for_each_piece<2>(
        walk, seat, [&](int64_t c, int) { return walk.template read<Walk::kSize>(c); },
        [&](int64_t c, const auto& piece) {
          constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
          A x[kSize], z[kSize], values[kSize];
          unpack(piece, x);
          unpack_logits<true>(piece, transform, z);
          gradient_of_logits<true>(c, z, coefficients, gradient, values);
          add_target(c, target, gradient, values);
          A sum = 0;
          CE_UNROLL for (int i = 0; i < kSize; ++i) {
            sum += values[i] * (transform.cap > 0 ? transform.slope(z[i]) : A(1)) * x[i];
          }
          total += sum;
        });
  }
  total = sum_of_lanes(total, kWarp);
  if (threadIdx.x % kWarp == 0) {
    p.partial_sums[blockIdx.x * (plan.threads / kWarp) + threadIdx.x / kWarp] = total;
  }
}

template <typename A>
__global__ void __launch_bounds__(kWarp)
    sum_scale_parts(const __grid_constant__ Problem p, const __grid_constant__ int64_t parts) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < parts; part += kWarp) {
    sum += p.partial_sums[part];
  }
  sum = sum_of_lanes(sum, kWarp);
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.grad.data) = static_cast<A>(sum);
  }
}

void find_divisor(const Problem& p, Stream stream) {
  if (p.divides_by_weight) {
    sum_rows(p, /*losses=*/false, stream);
  }
}

}  // namespace

void map_gradient(const Problem& p, const Plan& plan, Stream stream) {
  if (p.target_type == TargetType::kTeacher) {
    map_divergence_gradient(p, plan, /*of_teacher=*/false, stream);
    return;
  }
  if (plan.bundle > 1) {
    backward_bundles(p, plan, stream);
    return;
  }
  dispatch_walk(p, [&](auto* type) {
    using Walk = std::remove_pointer_t<decltype(type)>;
    Grid grid{blocks_for(p, plan), plan.threads};
    grid.early = true;
    if (is_general_backward(p)) {
      grid.shared = shared_states<Walk>(plan) * sizeof(RowState<Acc<typename Walk::Element>>);
      launch(logits_gradient<Walk, true>, grid, stream, p, plan);
    } else {
      launch(logits_gradient<Walk, false>, grid, stream, p, plan);
    }
  });
}

void backward(const Problem& p, const Plan& plan, Stream stream) {
  find_divisor(p, stream);
  if (p.picks > 0) {
    gather_picks(p, stream);
  }
  map_gradient(p, plan, stream);
  if (p.picks > 0) {
    write_picks(p, stream);
  }
}

void backward(const Problem& p, Stream stream) {
  backward(p, plan_backward(p, current_device()), stream);
}

void target_backward(const Problem& p, Stream stream) {
  find_divisor(p, stream);
  const Plan plan = plan_backward(p, current_device());
  if (p.target_type == TargetType::kTeacher) {
    map_divergence_gradient(p, plan, /*of_teacher=*/true, stream);
    return;
  }
  dispatch_walk(p, [&](auto* type) {
    launch(target_gradient<std::remove_pointer_t<decltype(type)>>, {blocks_for(p, plan), plan.threads}, stream, p,
           plan);
  });
}

int64_t weight_backward_sums(const Problem& p) {
  return weight_parts(p) * p.classes;
}

int64_t logit_scale_backward_sums() {
  return kScaleBlocks * kScaleWarps;
}

void logit_scale_backward(const Problem& p, Stream stream) {
  find_divisor(p, stream);
  Plan plan = plan_backward(p, current_device());
  plan.tiles = std::min(plan.tiles, kScaleBlocks / plan.blocks);
  dispatch_walk(p, [&](auto* type) {
    using Walk = std::remove_pointer_t<decltype(type)>;
    using A = Acc<typename Walk::Element>;
    Grid grid{blocks_for(p, plan), plan.threads};
    grid.shared = shared_states<Walk>(plan) * sizeof(RowState<A>);
    launch(logit_scale_gradient<Walk>, grid, stream, p, plan);
    launch(sum_scale_parts<A>, {1, kWarp}, stream, p, grid.blocks * (plan.threads / kWarp));
  });
}

void weight_backward(const Problem& p, Stream stream) {
  find_divisor(p, stream);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = (p.classes + kWeightBlock - 1) / kWeightBlock;
    const int64_t parts = std::min(weight_parts(p), kMaxBlocks / blocks);
    launch(weight_gradient<T>, {blocks * parts, kWeightBlock}, stream, p, parts);
    launch(sum_weight_parts<Acc<T>>, {blocks, kWeightBlock}, stream, p, parts);
  });
}

}  // namespace ce::cuda
