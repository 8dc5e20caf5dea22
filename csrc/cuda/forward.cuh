// What the kernels of the forward pass share: how a thread takes in its pieces, and what comes of a whole row.
#pragma once

#include "sums.cuh"

namespace ce::cuda {

// Whether the kernel before finds the divisor that the gradient needs, and nothing else: it lets the rows' kernel start
// when all that it reads is there but for the divisor. What reads picks comes after another one.
CE_HOST_DEVICE bool finds_divisor_before(const Problem& p) {
  return p.grad.data && p.divides_by_weight && p.picks == 0;
}

// What a thread has of a row: its state, or its stats where more than the loss is asked for.
template <typename A, bool kStats>
using State = std::conditional_t<kStats, RowStats<A>, RowState<A>>;
template <typename A>
CE_DEVICE RowState<A>& state_of(RowState<A>& state) {
  return state;
}
template <typename A>
CE_DEVICE RowState<A>& state_of(RowStats<A>& stats) {
  return stats.state;
}

// The first `count` pieces of a batch, logits of the formula as they are.
template <typename T, int kSize, int kBatch, typename Count>
CE_DEVICE void push_batch(MaxSum<Acc<T>>& exps, const Piece<T, kSize> (&batch)[kBatch], Count count) {
  using A = Acc<T>;
  Piece<T, kSize> tops = batch[0];
  CE_UNROLL for (int i = 1; i < kBatch; ++i) {
    if (i < count) {
      tops = larger(tops, batch[i]);
    }
  }
  const A top = largest(tops);
  if (top > exps.max) {
    exps.raise(top);
  }
  const A reference = exps.reference();
  const auto sum_of = [&](auto&& exponential_of) {
    A sums[2] = {};  // two chains of additions
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (i < count) {
        A z[kSize];
        unpack(batch[i], z);
        CE_UNROLL for (int j = 0; j < kSize; ++j) {
          sums[j % 2] += exponential_of(z[j]);
        }
      }
    }
    return sums[0] + sums[1];
  };
  const Exponentials<A> exponentials(reference);
  if (exponentials.apply()) {
    exps.sum += divide_approx(sum_of([&](A z) { return exponentials.power(z); }), exponentials.unit());
  } else {
    exps.sum += sum_of([&](A z) { return exponential(z - reference); });
  }
}

// What is asked for besides; of a target out of bounds there is none.
template <typename A>
CE_DEVICE void write_stats(const Problem&, int64_t, const RowTarget<A>&, A, const RowState<A>&) {}
template <typename A>
CE_DEVICE void write_stats(const Problem& p, int64_t offset, const RowTarget<A>& target, A target_logit,
                           const RowStats<A>& stats) {
  const MaxSum<A>& exps = stats.state.exps;
  if (p.log_prob) {
    static_cast<A*>(p.log_prob)[offset] = !target.kept       ? A(0)
                                          : target.index < 0 ? A(NAN)
                                                             : log_probability(exps, target_logit, exps.log_sum());
  }
  if (p.entropy) {
    static_cast<A*>(p.entropy)[offset] = stats.moment.entropy(exps, exps.log_sum());
  }
  if (p.argmax) {
    p.argmax[offset] = stats.place.argmax;
  }
  if (p.rank) {
    p.rank[offset] = target.index < 0 ? -1 : stats.place.rank;
  }
}

// Adds the target's own part to what the classes have left, writes the row's results, and adds it to `sums` if
// there are any.
template <bool kGeneral, typename A, typename Any, typename P>
CE_DEVICE void finish(const P& p, int64_t row, const RowTarget<A>& target, A target_logit, Any any, RowSums* sums) {
  RowState<A>& state = state_of(any);
  const int64_t offset = row_offset(p, row, p.row_strides);
  if (target.is_out_of_bounds() && p.bad_target) {
    report(p.bad_target, offset, index_of(p, row));
  }
  const auto write = [&](void* results, A value) {
    if (results) {
      static_cast<A*>(results)[offset] = value;
    }
  };
  write(p.max, state.exps.max);
  write(p.sum, state.exps.sum);
  write(p.lse, state.exps.lse());
  write_stats(p, offset, target, target_logit, any);
  if (has_indices(p)) {
    state.add(target.coefficient, target_logit);
  }
  if constexpr (kGeneral) {
    write(p.linear, state.linear);
    write(p.coefficients, state.coefficients);
  }
  const A loss = target.kept ? state.loss(A(p.z_loss)) : A(0);
  write(p.loss, loss);
  if (sums) {
    const A row_weight = row_value<A>(p, p.row_weight, row, 1);
    A weight = row_weight;
    if (has_indices(p)) {
      weight = target.index < 0 ? A(0) : row_weight * class_weight<A>(p, target.index);
    }
    add(*sums, {weighted_loss(row_weight, loss), weight});
  }
}

// With the picks' part, where there are any.
template <bool kGeneral, typename A>
CE_DEVICE void complete(const Problem& p, int64_t row, const RowTarget<A>& target, RowState<A>& state) {
  if (kGeneral && p.picks > 0 && target.kept) {
    state = Picks<A>(p, row).row.complete(state);
  }
}

template <typename T, typename P>
CE_DEVICE const T* row_of(const Input& operand, const P& p, int64_t row) {
  return static_cast<const T*>(operand.data) + row_offset(p, row, operand.strides);
}

template <typename A, typename T, typename P>
CE_DEVICE A given_logit(const P& p, int64_t row, int64_t index) {
  return to_accumulator(row_of<T>(p.logits, p, row)[index * p.logits.class_stride]);
}

template <bool kGeneral, typename A, typename T, typename P>
CE_DEVICE A target_logit(const P& p, int64_t row, const RowTarget<A>& target) {
  if (target.index < 0) {
    return 0;
  }
  const A x = given_logit<A, T>(p, row, target.index);
  return kGeneral ? apply(transform_of<A>(p), x) : x;
}

// Shared memory for the sums of a block's rows.
CE_HOST_DEVICE int shared_sums(const Plan& plan) {
  return plan.sums ? plan.rows() : 0;
}

// Leaves the sum of a tile's rows for sum_tiles(), or the results where there is no other tile. Of what the `count`
// threads that finish rows have in `shared`.
template <typename A>
CE_DEVICE void sum_tile(const Problem& p, const Plan& plan, const Seat& seat, const RowSums* shared, int count) {
  __syncthreads();
  if (threadIdx.x >= kWarp || seat.block != 0) {
    return;
  }
  RowSums sums;
  CE_NO_UNROLL for (int i = threadIdx.x; i < count; i += kWarp) {
    add(sums, shared[i]);
  }
  sums = sum_in_warp(sums);
  if (threadIdx.x == 0) {
    const unsigned tile = blockIdx.x >> log2_of(plan.blocks);
    const Workspace workspace(p.workspace);
    workspace.sums()[tile] = sums;
    if (gridDim.x == static_cast<unsigned>(plan.blocks)) {
      write_sums<A>(p, sums, /*losses=*/true, p.divides_by_weight && !p.grad.data);
    }
  }
}

// An ignored row is read only for what does not depend on the target.
template <bool kGeneral, typename A, typename P>
CE_DEVICE bool is_read(const P& p, const Plan& plan, int64_t row, int64_t index) {
  const bool may_count = !kGeneral || p.picks == 0 || counts<A>(p, row);
  return may_count && (plan.reads_all || reads_ignored_rows(p) || judge(p, index) != Verdict::kIgnored);
}

// A thread's pieces of a row that are kept in shared memory, `stride` apart.
template <typename Walk>
class Kept {
 public:
  using T = typename Walk::Element;
  using Whole = Piece<T, Walk::kSize>;

  CE_DEVICE Kept(Whole* pieces, int stride) : pieces_(pieces), stride_(stride) {}

  CE_DEVICE Whole& operator[](int turn) const { return pieces_[turn * stride_]; }

  // Begins to read those from turn to turn.
  CE_DEVICE void start(const Walk& walk, const Turns<Walk>& turns, int from, int to) const {
    const T* source = walk.address(turns.class_of(from));
    Whole* place = &(*this)[from];
    CE_UNROLL_BY(4) for (int left = to - from; left > 0; --left, source += turns.step, place += stride_) {
      copy_async(reinterpret_cast<uint4*>(place), reinterpret_cast<const uint4*>(source));
    }
  }

  // For write_row().
  CE_DEVICE Whole operator()(int64_t, int turn) const { return (*this)[turn]; }
  CE_DEVICE Piece<T, 1> element(const TargetPlace<Walk>& place) const {
    return {reinterpret_cast<const T*>(&(*this)[place.turn()])[place.element()]};
  }

 private:
  Whole* pieces_;
  int stride_;
};

}  // namespace ce::cuda
