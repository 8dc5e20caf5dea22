// Each row's maximum, log-sum-exp and loss, and the gradient of its logits, in one read of the logits.

#include "sums.cuh"

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

// Adds the target's own part to what the classes have left, writes the row's results and returns its loss.
template <bool kGeneral, typename A, typename Any>
CE_DEVICE A finish(const Problem& p, int64_t row, const RowTarget<A>& target, A target_logit, Any any) {
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
  return loss;
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

// Shared memory for the sums of a block's rows.
CE_HOST_DEVICE int shared_sums(const Plan& plan) {
  return plan.sums ? plan.rows() : 0;
}

// Leaves the sum of a tile's rows for sum_tiles(), or the results where there is no other tile. Of what each thread
// that finishes rows has in `shared`.
template <typename A>
CE_DEVICE void sum_tile(const Problem& p, const Plan& plan, const Seat& seat, const RowSums* shared) {
  __syncthreads();
  if (threadIdx.x >= kWarp || seat.block != 0) {
    return;
  }
  RowSums sums;
  CE_NO_UNROLL for (int i = threadIdx.x; i < plan.rows(); i += kWarp) {
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

// A thread's part of a row that is kept in shared memory, `stride` pieces apart.
template <typename Walk>
class Kept {
 public:
  using Whole = Piece<typename Walk::Element, Walk::kSize>;

  CE_DEVICE Kept(Whole* pieces, int stride) : pieces_(pieces), stride_(stride) {}

  CE_DEVICE Whole& operator[](int turn) const { return pieces_[turn * stride_]; }

  // For write_row().
  CE_DEVICE static constexpr bool is_kept() { return true; }
  CE_DEVICE Whole operator()(int64_t, int turn) const { return (*this)[turn]; }
  CE_DEVICE Piece<typename Walk::Element, 1> element(const TargetPlace<Walk>& place) const {
    return {reinterpret_cast<const typename Walk::Element*>(&(*this)[place.turn()])[place.element()]};
  }

  // Begins to read the pieces from turn to turn.
  CE_DEVICE void start(const Walk& walk, const Turns<Walk>& turns, int from, int to) const {
    CE_NO_UNROLL for (int turn = from; turn < to; ++turn) {
      copy_async(reinterpret_cast<uint4*>(&(*this)[turn]),
                 reinterpret_cast<const uint4*>(walk.address(turns.class_of(turn))));
    }
    commit_copies();
  }

 private:
  Whole* pieces_;
  int stride_;
};

template <typename Walk, bool kGrad, bool kGeneral, bool kStats>
__global__ void __launch_bounds__(kMaxThreads,
                                  kBlocks<typename Walk::Element, (Walk::kSize == 1 || kGrad) + 2 * kGeneral>)
    forward_rows(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  using Whole = Piece<T, Walk::kSize>;
  constexpr bool kCopies = kGrad && !kGeneral && Walk::kSize > 1;  // the pieces that it keeps
  const LogitTransform<A> transform = transform_of<A>(p);
  using Any = State<A, kStats>;
  const A order = kStats ? order_of_logits<A>(p) : A(0);
  Any* const states = static_cast<Any*>(shared_memory());
  RowSums* const sums = reinterpret_cast<RowSums*>(states + shared_states<Walk>(plan));

  // The general kernel is one for both, which is much less to compile; its registers are for both alike.
  const bool writes_grad = kGrad && (!kGeneral || p.grad.data);
  let_next_start();
  // An ignored row is read only for what does not depend on the target.
  const auto is_read = [&](int64_t row) {
    const bool may_count = !kGeneral || p.picks == 0 || counts<A>(p, row);
    return may_count && (plan.reads_all || reads_ignored_rows(p) || judge(p, index_of(p, row)) != Verdict::kIgnored);
  };
  const auto walk_along = [&](int64_t row, bool is_there) {
    return Walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, is_there ? p.classes : 0);
  };
  if (const Seat seat = Walk::seat(plan); plan.sums && seat.lane == 0) {
    sums[seat.row] = RowSums();
  }
  // Every thread goes through every turn, with or without a row: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const Seat seat = Walk::seat(plan);
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const int64_t index = index_of(p, row);
    const bool reads = exists && is_read(row);
    const Walk walk = walk_along(row, reads);
    const Kept<Walk> kept(reinterpret_cast<Whole*>(sums + shared_sums(plan)) + threadIdx.x, plan.threads);

    Any state;
    const auto read = [&](int64_t c, int turn) {
      const Whole whole = walk.template read<Walk::kSize>(c);
      if (kGrad && plan.kept > 0) {
        kept[turn] = whole;
      }
      return whole;
    };
    if constexpr (kGeneral) {
      A target_y = 0;
      if constexpr (kStats) {
        if (p.rank && reads && judge(p, index) == Verdict::kKept) {
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
      const Turns<Walk> turns(walk, seat);
      const auto push_some = [&](int64_t, const auto& batch, auto count) { push_batch(state.exps, batch, count); };
      if constexpr (kCopies) {
        // In whole batches, so that the sums are those of a row that is not kept.
        constexpr int kStages = 4;
        const int stage = (turns.count + kStages * Walk::kBatch - 1) / (kStages * Walk::kBatch) * Walk::kBatch;
        CE_NO_UNROLL for (int s = 0; s < kStages; ++s) {
          kept.start(walk, turns, s * stage, std::min((s + 1) * stage, turns.count));
        }
        CE_NO_UNROLL for (int s = 0; s < kStages; ++s) {
          wait_for_copies(kStages - 1 - s);
          for_each_batch<Walk::kBatch>(turns, s * stage, std::min((s + 1) * stage, turns.count), kept, push_some);
        }
      } else {
        for_each_batch<Walk::kBatch>(turns, 0, turns.count, read, push_some);
      }
      for_each_edge(walk, seat, [&](int64_t, const Piece<T, 1>& piece) {
        const Piece<T, 1> batch[1] = {piece};
        push_batch(state.exps, batch, 1);
      });
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
      const A loss = finish<kGeneral>(p, row, target, z_target, state);
      if (plan.sums) {
        const A row_weight = row_value<A>(p, p.row_weight, row, 1);
        const A weight = has_indices(p) ? (target.index < 0 ? A(0) : class_weight<A>(p, target.index)) : A(1);
        add(sums[seat.row], {row_weight * loss, row_weight * weight});
      }
    }
    if constexpr (kGrad) {
      if (writes_grad) {
        wait_for_previous();  // which has found the divisor meanwhile
        const Walk out = walk_along(row, exists);
        const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                                out);
        if (target.kept) {
          RowGradient<A> gradient = make_row_gradient<A>(state.exps, state.coefficients + target.coefficient,
                                                         A(p.z_loss), {upstream_of<A>(p, row)});
          if (kGeneral && p.picks > 0) {
            gradient = Picks<A>(p, row).row.gradient_of_others(gradient);
          }
          const Coefficients<T> coefficients(p, row, out);
          const auto write = [&](const auto& pieces) {
            write_row<kGeneral, 1>(out, seat, pieces, target, coefficients, transform, gradient, grad);
          };
          kCopies || plan.kept > 0 ? write(kept) : write(FromMemory<Walk>{out});
        } else {
          write_zeros(out, seat, grad);
        }
      }
    }
    if (plan.cluster) {
      leave_cluster();
    }
  }
  wait_for_previous();  // in any case: whoever comes next takes both for done
  if (plan.sums) {
    sum_tile<A>(p, plan, Walk::seat(plan), sums);
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

// Whether the gradient needs a divisor that a kernel has to find first. That kernel lets the rows' start when all that
// they read is there but for the divisor.
bool finds_divisor_before(const Problem& p) {
  return p.grad.data && p.divides_by_weight;
}

template <typename Walk, bool kGeneral, bool kStats>
void launch_rows(const Problem& p, const Plan& plan, Stream stream) {
  using T = typename Walk::Element;
  const bool merges = plan.blocks > 1 && !plan.cluster;
  Grid grid{blocks_for(p, plan), plan.threads, plan.cluster ? plan.blocks : 1};
  grid.early = finds_divisor_before(p) && p.picks == 0;
  grid.shared = shared_states<Walk>(plan) * sizeof(State<Acc<T>, kStats>) + shared_sums(plan) * sizeof(RowSums) +
                static_cast<int64_t>(plan.kept) * plan.threads * sizeof(Piece<T, Walk::kSize>);
  if constexpr (kStats) {
    launch(forward_rows<Walk, false, kGeneral, true>, grid, stream, p, plan);
  } else {
    const bool writes_grad = kGeneral || (p.grad.data && !has_gradient_pass(p, plan));
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

void forward(const Problem& problem, const Plan& given, Stream stream) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    Problem p = problem;
    Plan plan = given;
    const bool merges = plan.blocks > 1 && !plan.cluster;
    const bool grad_needs_a_pass = p.grad.data && has_gradient_pass(p, plan);
    if (grad_needs_a_pass && !p.max) {
      Acc<T>* rows = Workspace(p.workspace).template rows<Acc<T>>();
      for (void** of_rows : {&p.max, &p.sum, &p.teacher_max, &p.teacher_sum, &p.mean}) {
        *of_rows = rows;
        rows += p.rows;
      }
    }
    plan.sums = p.total && !merges && p.target_type != TargetType::kTeacher;
    if (plan.sums) {
      plan.tiles = std::min<int64_t>(plan.tiles, kMaxTiles);
    }
    if (finds_divisor_before(p)) {
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
    if (const int64_t tiles = blocks_for(p, plan) / plan.blocks; plan.sums && tiles > 1) {
      sum_tiles(p, static_cast<int>(tiles), stream);
    } else if (p.total && !plan.sums) {
      sum_rows(p, /*losses=*/true, stream);
    }
  });
}

void forward(const Problem& p, Stream stream) {
  forward(p, plan_forward(p, current_device()), stream);
}

}  // namespace ce::cuda
