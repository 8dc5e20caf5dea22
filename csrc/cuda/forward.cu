// Each row's maximum, log-sum-exp and loss, and the gradient of its logits, in one read of the logits.

#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {
namespace {

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

template <typename Any, typename A, int kSize>
CE_DEVICE void push(Any& any, const A (&z)[kSize]) {
  RowState<A>& state = state_of(any);
  A top = z[0];
  CE_UNROLL for (int i = 1; i < kSize; ++i) {
    top = std::fmax(top, z[i]);
  }
  if (top > state.exps.max) {
    any.raise(top);
  }
  const A reference = state.exps.reference();
  A sum = 0;
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    const A exp = exponential(z[i] - reference);
    sum += exp;
    if constexpr (std::is_same_v<Any, RowStats<A>>) {
      any.moment.sum += exp * std::fmax(z[i] - reference, -Moment<A>::kFarthest);
    }
  }
  state.exps.sum += sum;
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
    exps.sum += sum_of([&](A z) { return exponentials.power(z); }) / exponentials.unit();
  } else {
    exps.sum += sum_of([&](A z) { return exponential(z - reference); });
  }
}

// Of elements that have been pushed.
template <typename A, int kSize>
CE_DEVICE void push_linear(RowState<A>& state, const A (&z)[kSize], const A (&coefficients)[kSize]) {
  const A reference = state.exps.reference();
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    state.linear += coefficients[i] * (z[i] - reference);
    state.coefficients += coefficients[i];
  }
}

// Classes from c on, of the logits as they are given times ±1.
template <typename A, int kSize>
CE_DEVICE void push(RowPlace<A>& place, int64_t c, const A (&y)[kSize], int64_t target, A target_y) {
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    place = place.merge({y[i], c + i, RowPlace<A>::is_before(y[i], target_y, c + i < target)});
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
                                                             : log_probability(exps, target_logit);
  }
  if (p.entropy) {
    static_cast<A*>(p.entropy)[offset] = stats.moment.entropy(exps);
  }
  if (p.argmax) {
    p.argmax[offset] = stats.place.argmax;
  }
  if (p.rank) {
    p.rank[offset] = target.index < 0 ? -1 : stats.place.rank;
  }
}

// Adds the target's own part to what the classes have left, and writes the row's results.
template <bool kGeneral, typename A, typename Any>
CE_DEVICE void finish(const Problem& p, int64_t row, const RowTarget<A>& target, A target_logit, Any any) {
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
  write(p.loss, target.kept ? state.loss(A(p.z_loss)) : A(0));
}

// With the picks' part, where there are any.
template <bool kGeneral, typename A>
CE_DEVICE void complete(const Problem& p, int64_t row, const RowTarget<A>& target, RowState<A>& state) {
  if (kGeneral && p.picks > 0 && target.kept) {
    state = Picks<A>(p, row).row.complete(state);
  }
}

template <typename T>
CE_DEVICE const T* row_of(const Input& operand, const Problem& p, int64_t row) {
  return static_cast<const T*>(operand.data) + row_offset(p, row, operand.strides);
}

template <typename A, typename T>
CE_DEVICE A given_logit(const Problem& p, int64_t row, int64_t index) {
  return to_accumulator(row_of<T>(p.logits, p, row)[index * p.logits.class_stride]);
}

template <bool kGeneral, typename A, typename T>
CE_DEVICE A target_logit(const Problem& p, int64_t row, const RowTarget<A>& target) {
  if (target.index < 0) {
    return 0;
  }
  const A x = given_logit<A, T>(p, row, target.index);
  return kGeneral ? apply(transform_of<A>(p), x) : x;
}

// Reads the whole pieces into the memory that keeps them, all of them under way together, and calls f as for_each_batch
// does as they arrive.
template <typename Walk, typename F, typename Whole = Piece<typename Walk::Element, Walk::kSize>>
CE_DEVICE void push_kept(const Walk& walk, const Turns<Walk>& turns, Whole* kept, int stride, F&& f) {
  constexpr int kStages = 4;  // in which they arrive
  // In whole batches, so that the sums are those of for_each_batch.
  const int stage = (turns.count + kStages * Walk::kBatch - 1) / (kStages * Walk::kBatch) * Walk::kBatch;
  CE_NO_UNROLL for (int s = 0; s < kStages; ++s) {
    CE_NO_UNROLL for (int turn = s * stage; turn < turns.count && turn < (s + 1) * stage; ++turn) {
      copy_async(reinterpret_cast<uint4*>(kept + turn * stride),
                 reinterpret_cast<const uint4*>(walk.address(turns.class_of(turn))));
    }
    commit_copies();
  }
  const auto read = [&](int64_t, int turn) { return kept[turn * stride]; };
  CE_NO_UNROLL for (int s = 0; s < kStages; ++s) {
    wait_for_copies(kStages - 1 - s);
    for_each_batch<Walk::kBatch>(turns, s * stage, std::min((s + 1) * stage, turns.count), read, f);
  }
}

template <typename Walk, bool kGrad, bool kGeneral, bool kStats>
__global__ void __launch_bounds__(kMaxThreads,
                                  kBlocks<typename Walk::Element, (Walk::kSize == 1 || kGrad) + 2 * kGeneral>)
    forward_rows(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  using Whole = Piece<T, Walk::kSize>;
  const LogitTransform<A> transform = transform_of<A>(p);
  using Any = State<A, kStats>;
  const A order = kStats ? order_of_logits<A>(p) : A(0);
  Any* const states = static_cast<Any*>(shared_memory());
  Whole* const kept = reinterpret_cast<Whole*>(states + shared_states<Walk>(plan)) + threadIdx.x;

  // The general kernel is one for both, which is much less to compile; its registers are for both alike.
  const bool writes_grad = kGrad && (!kGeneral || p.grad.data);
  const Seat seat = Walk::seat(plan);
  let_next_start();
  // Every thread goes through every turn, with or without a row: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const int64_t index = index_of(p, row);
    // Otherwise an ignored row is read only for what does not depend on the target.
    const bool may_count = !kGeneral || p.picks == 0 || counts<A>(p, row);
    const bool is_read =
        exists && may_count && (plan.reads_all || reads_ignored_rows(p) || judge(p, index) != Verdict::kIgnored);
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride,
                    is_read ? p.classes : 0);

    Any state;
    const auto read = [&](int64_t c, int turn) {
      const Whole whole = walk.template read<Walk::kSize>(c, /*once=*/!writes_grad || plan.kept > 0);
      if (kGrad && plan.kept > 0) {
        kept[turn * plan.threads] = whole;
      }
      return whole;
    };
    if constexpr (kGeneral) {
      A target_y = 0;
      if constexpr (kStats) {
        if (p.rank && is_read && judge(p, index) == Verdict::kKept) {
          target_y = given_logit<A, T>(p, row, index) * order;
        }
      }
      const Coefficients<T> coefficients(p, row, walk);
      for_each_piece<Walk::kBatch>(walk, seat, read, [&](int64_t c, const auto& piece) {
        constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
        A z[kSize];
        unpack_logits<kGeneral>(piece, transform, z);
        push(state, z);
        if (has_coefficients(p)) {
          A a[kSize];
          coefficients.read(c, a);
          push_linear(state_of(state), z, a);
        }
        if constexpr (kStats) {
          if (p.argmax || p.rank) {
            unpack(piece, z);
            CE_UNROLL for (int i = 0; i < kSize; ++i) {
              z[i] *= order;
            }
            push(state.place, c, z, index, target_y);
          }
        }
      });
    } else {
      const auto push_one = [&](int64_t, const Piece<T, 1>& piece) {
        const Piece<T, 1> batch[1] = {piece};
        push_batch(state.exps, batch, 1);
      };
      const auto push_some = [&](int64_t, const auto& batch, auto count) { push_batch(state.exps, batch, count); };
      const Turns<Walk> turns(walk, seat);
      if (kGrad && Walk::kSize > 1 && plan.kept > 0) {
        push_kept(walk, turns, kept, plan.threads, push_some);
      } else {
        for_each_batch<Walk::kBatch>(turns, 0, turns.count, read, push_some);
      }
      for_each_edge(walk, seat, push_one);
    }
    const RowTarget<A> target = exists ? target_of<kGeneral, A>(p, row, index) : RowTarget<A>();
    // For the row's first thread, before the gradient may replace it.
    const A z_target = seat.rank == 0 ? target_logit<kGeneral, A, T>(p, row, target) : A(0);
    state = sum_in_block<Walk, kGeneral>(state, plan, states);
    if (plan.cluster) {
      state = sum_in_cluster<kGeneral>(state, plan, states);
    } else if (plan.blocks > 1) {
      if (seat.lane == 0 && exists) {
        Workspace(p.workspace).template parts<Any>()[row * plan.blocks + seat.block] = state;
      }
      continue;
    }
    complete<kGeneral>(p, row, target, state_of(state));
    if (seat.rank == 0 && exists) {
      finish<kGeneral>(p, row, target, z_target, state);
    }
    if constexpr (kGrad) {
      if (writes_grad) {
        const Walk out(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride,
                       exists ? p.classes : 0);
        const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                                out);
        if (target.kept) {
          RowGradient<A> gradient =
              make_row_gradient<A>(state.exps, state.coefficients + target.coefficient, A(p.z_loss),
                                   {upstream_of<A>(p, row)});
          if (kGeneral && p.picks > 0) {
            gradient = Picks<A>(p, row).row.gradient_of_others(gradient);
          }
          const Coefficients<T> coefficients(p, row, out);
          const auto write = [&](int64_t c, const auto& piece) {
            write_gradient<kGeneral>(grad, c, piece, target, coefficients, transform, gradient);
          };
          const TargetPlace<Walk> place(out, seat, target.index);
          const auto read_again = [&](int64_t c, int turn) {
            return plan.kept > 0 ? kept[turn * plan.threads] : out.template read<Walk::kSize>(c);
          };
          for_each_piece<1>(out, seat, read_again, write);
          place.write(write);
        } else {
          write_zeros(out, seat, grad);
        }
      }
    }
    if (plan.cluster) {
      leave_cluster();
    }
  }
}

// What blocks have found of the rows that they share, a warp for each row.
template <typename T, bool kGeneral, bool kStats>
__global__ void __launch_bounds__(kMaxThreads)
    merge_parts(const __grid_constant__ Problem p, const __grid_constant__ int blocks) {
  using A = Acc<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (row >= p.rows) {
    return;
  }
  using Any = State<A, kStats>;
  const Any* const parts = Workspace(p.workspace).template parts<Any>() + row * blocks;
  Any state;
  for (int part = threadIdx.x % kWarp; part < blocks; part += kWarp) {
    state = state.merge(parts[part]);
  }
  state = sum_of_lanes<kGeneral>(state, kWarp);
  if (threadIdx.x % kWarp == 0) {
    const RowTarget<A> target = target_of<kGeneral, A>(p, row, index_of(p, row));
    complete<kGeneral>(p, row, target, state_of(state));
    finish<kGeneral>(p, row, target, target_logit<kGeneral, A, T>(p, row, target), state);
  }
}

template <typename Walk, bool kGeneral, bool kStats>
void launch_rows(const Problem& p, const Plan& plan, Stream stream) {
  using T = typename Walk::Element;
  const bool merges = plan.blocks > 1 && !plan.cluster;
  Grid grid{blocks_for(p, plan), plan.threads, plan.cluster ? plan.blocks : 1};
  grid.shared = shared_states<Walk>(plan) * sizeof(State<Acc<T>, kStats>) +
                static_cast<int64_t>(plan.kept) * plan.threads * sizeof(Piece<T, Walk::kSize>);
  if constexpr (kStats) {
    launch(forward_rows<Walk, false, kGeneral, true>, grid, stream, p, plan);
  } else {
    const bool writes_grad = kGeneral || (p.grad.data && !merges);
    launch(writes_grad ? forward_rows<Walk, true, kGeneral, false> : forward_rows<Walk, kGeneral, kGeneral, false>,
           grid, stream, p, plan);
  }
  if (merges) {
    constexpr int kRows = 8;  // of a block
    launch(merge_parts<T, kGeneral, kStats>, {(p.rows + kRows - 1) / kRows, kRows * kWarp}, stream, p, plan.blocks);
  }
}

template <typename Walk>
void launch_rows(const Problem& p, const Plan& plan, Stream stream) {
  has_stats(p)    ? launch_rows<Walk, true, true>(p, plan, stream)
  : is_general(p) ? launch_rows<Walk, true, false>(p, plan, stream)
                  : launch_rows<Walk, false, false>(p, plan, stream);
}

}  // namespace

void forward(const Problem& problem, const Plan& plan, Stream stream) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    Problem p = problem;
    const bool grad_needs_a_pass = p.grad.data && plan.blocks > 1 && !plan.cluster;
    if (grad_needs_a_pass && !p.max) {
      Acc<T>* rows = Workspace(p.workspace).template rows<Acc<T>>();
      for (void** of_rows : {&p.max, &p.sum, &p.teacher_max, &p.teacher_sum, &p.mean}) {
        *of_rows = rows;
        rows += p.rows;
      }
    }
    if (p.grad.data && p.divides_by_weight) {
      sum_rows(p, /*losses=*/false, stream);
    }
    if (p.picks > 0) {
      gather_picks(p, stream);
    }
    if (p.target_type == TargetType::kTeacher) {
      diverge(p, plan, stream);
    } else {
      walks_along(p) ? launch_rows<Along<T>>(p, plan, stream) : launch_rows<Across<T>>(p, plan, stream);
    }
    if (grad_needs_a_pass) {
      map_gradient(p, plan_backward(p, current_device()), stream);
    }
    if (p.picks > 0 && p.grad.data) {
      write_picks(p, stream);
    }
    if (p.total) {
      sum_rows(p, /*losses=*/true, stream);
    }
  });
}

void forward(const Problem& p, Stream stream) {
  forward(p, plan_forward(p, current_device()), stream);
}

}  // namespace ce::cuda
