// Each row's maximum, log-sum-exp and loss, and the gradient of its logits, for which the row waits in shared memory:
// of calls that are not general, and rows whose classes lie next to each other.

#include "forward.cuh"

namespace ce::cuda {
namespace {

template <typename T, typename P>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T, 1>)
    forward_grad_rows(const __grid_constant__ P p, const __grid_constant__ Plan plan) {
  using Walk = Along<T>;
  using A = Acc<T>;
  using Whole = Piece<T, Walk::kSize>;
  RowState<A>* const states = static_cast<RowState<A>*>(shared_memory());
  RowSums* const sums = reinterpret_cast<RowSums*>(states + shared_states<Walk>(plan));
  const Kept<Walk> kept(reinterpret_cast<Whole*>(sums + shared_sums(plan)) + threadIdx.x, plan.threads);
  const Seat seat = Walk::seat(plan);

  let_next_start();
  if (!finds_divisor_before(p)) {
    wait_for_previous();
  }
  if (plan.sums && seat.lane == 0) {
    sums[seat.row] = RowSums();
  }
  // Every thread goes through every turn, with or without a row: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const int64_t index = index_of(p, row);
    const bool reads = exists && is_read<false, A>(p, plan, row, index);
    const int64_t offset = row_offset(p, row, p.logits.strides);
    const Walk walk(p.logits.data, offset, p.logits.class_stride, reads ? p.classes : 0);
    const Turns<Walk> turns(walk, seat);
    // In two halves, the first of which is whole batches.
    const int half = std::min((turns.count + 2 * Walk::kBatch - 1) / (2 * Walk::kBatch) * Walk::kBatch, turns.count);
    kept.start(walk, turns, 0, half);
    kept.start(walk, turns, half, turns.count);
    const RowTarget<A> target = exists ? target_of<false, A>(p, row, index) : RowTarget<A>();
    // For the row's first thread, before the gradient may replace it.
    const A z_target = seat.rank == 0 ? target_logit<false, A, T>(p, row, target) : A(0);

    RowState<A> state;
    CE_NO_UNROLL for (int i = 0; i < 2; ++i) {
      wait_for_copies(1 - i);
      for_each_batch<Walk::kBatch>(
          turns, i == 0 ? 0 : half, i == 0 ? half : turns.count, kept,
          [&](int64_t, const auto& batch, auto count) { push_batch(state.exps, batch, count); });
    }
    for_each_edge(walk, seat, [&](int64_t, const Piece<T, 1>& piece) {
      const Piece<T, 1> batch[1] = {piece};
      push_batch(state.exps, batch, 1);
    });
    state = sum_in_block<Walk, false>(state, plan, states);
    if (plan.cluster) {
      state = sum_in_cluster<false>(state, plan, states);
    }
    if (seat.rank == 0 && exists) {
      finish<false>(p, row, target, z_target, state, plan.sums ? &sums[seat.row] : nullptr);
    }

    wait_for_previous();  // which has found the divisor meanwhile
    const Walk out(p.logits.data, offset, p.logits.class_stride, exists ? p.classes : 0);
    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                            out);
    if (target.kept) {
      const RowGradient<A> gradient =
          make_row_gradient<A>(state.exps, target.coefficient, A(p.z_loss), {upstream_of(p, row, A(1))});
      write_row<false, 1>(out, seat, kept, target, Coefficients<T>(p, row, out), transform_of<A>(p), gradient, grad);
    } else {
      write_zeros(out, seat, grad);
    }
    if (plan.cluster) {
      leave_cluster();
    }
  }
  wait_for_previous();  // in any case: whoever comes next takes both for done
  if (plan.sums) {
    sum_tile<A>(p, plan, seat, sums);
  }
}

template <typename T, typename P>
void launch_grad_rows(const P& p, const Plan& plan, Stream stream) {
  using Walk = Along<T>;
  Grid grid{blocks_for(p, plan), plan.threads, plan.blocks};
  grid.early = true;
  grid.shared = shared_bytes<Walk, RowState<Acc<T>>>(plan);
  launch(forward_grad_rows<T, P>, grid, stream, p, plan);
}

}  // namespace

void forward_grad(const Problem& p, const Plan& plan, Stream stream) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_plain<T>(p, [&](const auto& problem) { launch_grad_rows<T>(problem, plan, stream); });
  });
}

}  // namespace ce::cuda
