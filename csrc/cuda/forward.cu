// Each row's maximum, log-sum-exp and loss, and what else is asked of it, in one read of the logits; the gradients too
// that are not forward_grad.cu's.

#include "forward.cuh"

namespace ce::cuda {
namespace {

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

template <typename Walk, bool kGrad, bool kGeneral, bool kStats, typename P>
__global__ void __launch_bounds__(kMaxThreads,
                                  kBlocks<typename Walk::Element, (Walk::kSize == 1 || kGrad) + 2 * kGeneral>)
    forward_rows(const __grid_constant__ P p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  using Whole = Piece<T, Walk::kSize>;
  const LogitTransform<A> transform = transform_of<A>(p);
  using Any = State<A, kStats>;
  const A order = kStats ? order_of_logits<A>(p) : A(0);
  Any* const states = static_cast<Any*>(shared_memory());
  RowSums* const sums = reinterpret_cast<RowSums*>(states + shared_states<Walk>(plan));

  // The general kernel is one for both, which is much less to compile; its registers are for both alike.
  const bool writes_grad = kGrad && (!kGeneral || p.grad.data);
  let_next_start();
  if (!finds_divisor_before(p)) {
    wait_for_previous();
  }
  if (const Seat seat = Walk::seat(plan); plan.sums && seat.lane == 0) {
    sums[seat.row] = RowSums();
  }
  // Every thread goes through every turn, with or without a row: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const Seat seat = Walk::seat(plan);
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const int64_t index = index_of(p, row);
    const bool reads = exists && is_read<kGeneral, A>(p, plan, row, index);
    const int64_t offset = row_offset(p, row, p.logits.strides);
    const Walk walk(p.logits.data, offset, p.logits.class_stride, reads ? p.classes : 0);
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
      for_each_batch<Walk::kBatch>(turns, 0, turns.count, read, push_some);
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
      finish<kGeneral>(p, row, target, z_target, state, plan.sums ? &sums[seat.row] : nullptr);
    }
    if constexpr (kGrad) {
      if (writes_grad) {
        wait_for_previous();  // which has found the divisor meanwhile
        const Walk out(p.logits.data, offset, p.logits.class_stride, exists ? p.classes : 0);
        const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                                out);
        if (target.kept) {
          RowGradient<A> gradient = make_row_gradient<A>(state.exps, state.coefficients + target.coefficient,
                                                         A(p.z_loss), {upstream_of(p, row, A(1))});
          if (kGeneral && p.picks > 0) {
            gradient = Picks<A>(p, row).row.gradient_of_others(gradient);
          }
          const Coefficients<T> coefficients(p, row, out);
          const auto write = [&](const auto& pieces) {
            write_row<kGeneral, 1>(out, seat, pieces, target, coefficients, transform, gradient, grad);
          };
          plan.kept > 0 ? write(kept) : write(FromMemory<Walk>{out});
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
    sum_tile<A>(p, plan, Walk::seat(plan), sums, plan.rows());
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
    finish<kGeneral>(p, row, target, target_logit<kGeneral, A, T>(p, row, target), state, nullptr);
  }
}

// Shared memory of a block: the states that are summed up, its rows' sums, the kept pieces.
template <typename Walk, typename State>
int64_t shared_bytes(const Plan& plan) {
  return shared_states<Walk>(plan) * sizeof(State) + shared_sums(plan) * sizeof(RowSums) +
         static_cast<int64_t>(plan.kept) * plan.threads * sizeof(Piece<typename Walk::Element, Walk::kSize>);
}

template <typename T, bool kGeneral, bool kStats>
void merge_rows(const Problem& p, int blocks, Stream stream) {
  constexpr int kRows = 8;  // of a block
  launch(merge_parts<T, kGeneral, kStats>, {(p.rows + kRows - 1) / kRows, kRows * kWarp}, stream, p, blocks);
}

template <typename Walk, bool kGeneral, bool kStats, typename P>
void launch_rows(const P& p, const Plan& plan, Stream stream) {
  using T = typename Walk::Element;
  Grid grid{blocks_for(p, plan), plan.threads, plan.cluster ? plan.blocks : 1};
  grid.early = true;
  grid.shared = shared_bytes<Walk, State<Acc<T>, kStats>>(plan);
  if constexpr (kStats) {
    launch(forward_rows<Walk, false, kGeneral, true, P>, grid, stream, p, plan);
  } else {
    constexpr bool kGrad = kGeneral || Walk::kSize == 1;  // the others' gradient is forward_grad()'s
    const bool writes_grad = kGeneral || (p.grad.data && !has_gradient_pass(p, plan));
    launch(
        writes_grad ? forward_rows<Walk, kGrad, kGeneral, false, P> : forward_rows<Walk, kGeneral, kGeneral, false, P>,
        grid, stream, p, plan);
  }
  if (merges_parts(plan)) {
    merge_rows<T, kGeneral, kStats>(p, plan.blocks, stream);
  }
}

template <typename Walk>
void launch_rows(const Problem& p, const Plan& plan, Stream stream) {
  if (has_stats(p)) {
    launch_rows<Walk, true, true>(p, plan, stream);
  } else if (is_general(p)) {
    launch_rows<Walk, true, false>(p, plan, stream);
  } else if constexpr (Walk::kSize > 1 && !std::is_same_v<typename Walk::Element, Float16>) {
    // Of float16 such a kernel would spill.
    dispatch_plain<typename Walk::Element>(
        p, [&](const auto& problem) { launch_rows<Walk, false, false>(problem, plan, stream); });
  } else {
    launch_rows<Walk, false, false>(p, plan, stream);
  }
}

}  // namespace

void forward(const Problem& problem, const Plan& given, Stream stream) {
  dispatch(problem.dtype, [&](auto element) {
    using T = decltype(element);
    Problem p = problem;
    Plan plan = given;
    const bool grad_needs_a_pass = p.grad.data && has_gradient_pass(p, plan);
    if (grad_needs_a_pass && !p.max) {
      Acc<T>* rows = Workspace(p.workspace).template rows<Acc<T>>();
      for (void** of_rows : {&p.max, &p.sum, &p.teacher_max, &p.teacher_sum, &p.mean}) {
        *of_rows = rows;
        rows += p.rows;
      }
    }
    plan.sums = p.total && !merges_parts(plan) && p.target_type != TargetType::kTeacher;
    if (plan.sums) {
      plan.tiles = std::min<int64_t>(plan.tiles, kMaxTiles);
    }
    if (p.grad.data && p.divides_by_weight) {
      sum_rows(p, /*losses=*/false, stream);
    }
    if (p.picks > 0) {
      gather_picks(p, stream);
    }
    if (p.target_type == TargetType::kTeacher) {
      diverge(p, plan, stream);
    } else if (plan.bundle > 1) {
      forward_bundles(p, plan, stream);
      if (merges_parts(plan)) {
        merge_rows<T, false, false>(p, plan.blocks, stream);
      }
    } else if (p.grad.data && walks_along(p) && !is_general(p) && !grad_needs_a_pass) {
      forward_grad(p, plan, stream);
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
