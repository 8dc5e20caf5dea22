// Each row's maximum, log-sum-exp and loss, and the gradient of its logits, for which the row waits in shared memory:
// of calls that are not general, and rows whose classes lie next to each other.

#include "forward.cuh"

namespace ce::cuda {
namespace {

// A block's shared memory.
template <typename T>
struct Shared {
  using Walk = Along<T>;
  using A = Acc<T>;
  using Whole = Piece<T, Walk::kSize>;

  RowState<A>* states;
  RowSums* sums;
  void* exchange;
  Whole* kept;

  CE_DEVICE explicit Shared(const Plan& plan)
      : states(static_cast<RowState<A>*>(shared_memory())),
        sums(reinterpret_cast<RowSums*>(states + count_of_states(plan))),
        exchange(sums + shared_sums(plan)),
        kept(reinterpret_cast<Whole*>(static_cast<char*>(exchange) + Exchange<A>::bytes(plan))) {}

  static int64_t bytes(const Plan& plan) {
    return count_of_states(plan) * sizeof(RowState<A>) + shared_sums(plan) * sizeof(RowSums) +
           Exchange<A>::bytes(plan) + static_cast<int64_t>(plan.kept) * plan.threads * sizeof(Whole);
  }

 private:
  CE_HOST_DEVICE static int count_of_states(const Plan& plan) { return plan.cluster ? 0 : shared_states<Walk>(plan); }
};

template <typename T, typename P>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T, 1>)
    forward_grad_rows(const __grid_constant__ P p, const __grid_constant__ Plan plan) {
  using Walk = Along<T>;
  using A = Acc<T>;
  const Shared<T> shared(plan);
  const Kept<Walk> kept(shared.kept + threadIdx.x, plan.threads);
  const Seat seat = Walk::seat(plan);

  let_next_start();
  if (!finds_divisor_before(p)) {
    wait_for_previous();
  }
  if (plan.sums && seat.lane == 0) {
    shared.sums[seat.row] = RowSums();
  }
  Exchange<A> exchange(shared.exchange, plan);
  // Every thread goes through every turn, with or without a row: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const int64_t index = index_of(p, row);
    const int64_t offset = row_offset(p, row, p.logits.strides);
    const Walk walk(p.logits.data, offset, p.logits.class_stride, exists ? p.classes : 0);
    const Turns<Walk> turns(walk, seat);
    // In two halves, the first of which is whole batches. A batch is under way before the index has arrived.
    const int half = std::min((turns.count + 2 * Walk::kBatch - 1) / (2 * Walk::kBatch) * Walk::kBatch, turns.count);
    const int early = std::min(int{Walk::kBatch}, half);
    kept.start(walk, turns, 0, early);
    const bool reads = exists && is_read<false, A>(p, plan, row, index);
    if (reads) {
      kept.start(walk, turns, early, half);
    }
    commit_copies();
    if (reads) {
      kept.start(walk, turns, half, turns.count);
    }
    commit_copies();
    const RowTarget<A> target = exists ? target_of<false, A>(p, row, index) : RowTarget<A>();
    // For the row's first thread, before the gradient may replace it.
    const A z_target = seat.rank == 0 ? target_logit<false, A, T>(p, row, target) : A(0);
    wait_for_previous();  // which has found the divisor meanwhile
    const A upstream = upstream_of(p, row, A(1));

    RowState<A> state;
    CE_NO_UNROLL for (int i = 0; i < 2; ++i) {
      wait_for_copies(1 - i);
      if (reads) {
        for_each_batch<Walk::kBatch>(
            turns, i == 0 ? 0 : half, i == 0 ? half : turns.count, kept,
            [&](int64_t, const auto& batch, auto count) { push_batch(state.exps, batch, count); });
      }
    }
    if (reads) {
      for_each_edge(walk, seat, [&](int64_t, const Piece<T, 1>& piece) {
        const Piece<T, 1> batch[1] = {piece};
        push_batch(state.exps, batch, 1);
      });
    }
    if (kHasClusters && plan.cluster) {
      // Others may write to where this thread has read z_target as soon as they have its part, which waits for that.
      state.exps.sum = z_target != z_target ? z_target : state.exps.sum;
      state.exps = exchange.sum(state, plan, seat);
    } else {
      state = sum_in_block<Walk, false>(state, plan, shared.states);
    }
    if (seat.rank == 0 && exists) {
      finish<false>(p, row, target, z_target, state, plan.sums ? &shared.sums[seat.row] : nullptr);
    }

    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                            walk);
    if (target.kept) {
      const RowGradient<A> gradient = make_row_gradient<A>(state.exps, target.coefficient, A(p.z_loss), {upstream});
      write_row<false, 1>(walk, seat, kept, target, Coefficients<T>(p, row, walk), transform_of<A>(p), gradient, grad);
    } else {
      write_zeros(walk, seat, grad);
    }
  }
  wait_for_previous();  // in any case: whoever comes next takes both for done
  if (plan.sums) {
    sum_tile<A>(p, plan, seat, shared.sums, plan.rows());
  }
}

template <typename T, typename P>
void launch_grad_rows(const P& p, const Plan& plan, Stream stream) {
  Grid grid{blocks_for(p, plan), plan.threads, plan.blocks};
  grid.early = true;
  grid.shared = Shared<T>::bytes(plan);
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
