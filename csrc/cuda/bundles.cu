// Forward and backward passes of calls that are not general, where classes lie apart and rows next to each other, as
// the pixels of images do. A thread takes sixteen bytes of each of its classes: a bundle of neighbouring rows. What is
// done once for a row is done by all threads of a block, for the rows of its tile in turn.

#include "forward.cuh"

namespace ce::cuda {
namespace {

template <typename T>
constexpr int kBundle = 16 / sizeof(T);
template <typename T>
using BundlePiece = Piece<T, kBundle<T>>;

// What a thread has of its rows.
template <typename T>
struct BundleState {
  MaxSum<Acc<T>> rows[kBundle<T>];

  CE_DEVICE BundleState merge(const BundleState& other) const {
    BundleState result;
    CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
      result.rows[r] = rows[r].merge(other.rows[r]);
    }
    return result;
  }

  // The first `count` of the pieces that `get` has.
  template <int kUnroll, typename Get>
  CE_DEVICE void push(int count, Get&& get) {
    using A = Acc<T>;
    BundlePiece<T> tops = get(0);
    CE_UNROLL_BY(kUnroll) for (int i = 1; i < count; ++i) {
      tops = larger(tops, get(i));
    }
    A z[kBundle<T>], references[kBundle<T>];
    unpack(tops, z);
    CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
      if (z[r] > rows[r].max) {
        rows[r].raise(z[r]);
      }
      references[r] = rows[r].reference();
    }
    CE_UNROLL_BY(kUnroll) for (int i = 0; i < count; ++i) {
      unpack(get(i), z);
      CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
        rows[r].sum += exponential(z[r] - references[r]);
      }
    }
  }
};

// Of a row: what its own part of the results is made from,
template <typename A>
struct RowParts {
  MaxSum<A> exps;
  int64_t index;  // what index_of() has read
};
// and then what its gradients are made from.
template <typename A>
struct GradientParts {
  A max;
  A scale;     // of the exponentials
  A own;       // what the target's class has besides
  int target;  // that class, or −1

  // 0 in all classes, whatever the logits are.
  CE_DEVICE static GradientParts zeros() { return {0, 0, 0, kZeros}; }
  CE_DEVICE bool is_zeros() const { return target == kZeros; }

 private:
  static constexpr int kZeros = -2;
};
// A row of a block's tile, in shared memory.
template <typename A>
union alignas(16) TileRow {
  RowParts<A> row;
  GradientParts<A> gradient;
};

// A thread's classes of a bundle: those from `first` on, `step` apart.
struct Classes {
  int first, step, count;

  CE_DEVICE Classes(const Seat& seat, int64_t classes)
      : first(seat.rank),
        step(1 << seat.bits),
        count(static_cast<int>((classes - seat.rank + step - 1) >> seat.bits)) {}
};

// Its pieces of them, `stride` elements apart.
template <typename T>
struct BundlePieces {
  T* first;
  int64_t stride;

  template <typename Pointer>
  CE_DEVICE BundlePieces(const Problem& p, const Operand<Pointer>& operand, int64_t row, const Classes& classes)
      : first(static_cast<T*>(operand.data) + row_offset(p, row, operand.strides) +
              classes.first * operand.class_stride),
        stride(classes.step * operand.class_stride) {}
  // Those in shared memory.
  CE_DEVICE BundlePieces(BundlePiece<std::remove_const_t<T>>* kept, const Plan& plan)
      : first(kept->elements), stride(plan.threads * kBundle<T>) {}

  CE_DEVICE T* at(int turn) const { return first + turn * stride; }
};

// Writes the gradients of a thread's part of a bundle, whose rows are `rows`.
template <int kBatch, typename T>
CE_DEVICE void write_bundle(BundlePieces<T> grad, BundlePieces<const T> logits, const Classes& classes,
                            const TileRow<Acc<T>>* rows) {
  using A = Acc<T>;
  GradientParts<A> of[kBundle<T>];
  bool has_zeros = false;
  CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
    of[r] = rows[r].gradient;
    has_zeros |= of[r].is_zeros();
  }
  const auto write = [&](T* address, int c, const BundlePiece<T>& piece) {
    A z[kBundle<T>];
    unpack(piece, z);
    CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
      const A own = of[r].target == c ? of[r].own : A(0);
      z[r] = RowGradient<A>::element(exponential(z[r] - of[r].max), own, of[r].scale, A(1));
    }
    if (has_zeros) {
      CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
        z[r] = of[r].is_zeros() ? A(0) : z[r];
      }
    }
    store(address, pack<T, kBundle<T>>(z));
  };
  int c = classes.first;
  CE_NO_UNROLL for (int left = classes.count; left > 0; left -= kBatch, c += kBatch * classes.step) {
    BundlePiece<T> batch[kBatch];
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (i < left) {
        batch[i] = load<T, kBundle<T>>(logits.at(i));
      }
    }
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (i < left) {
        write(grad.at(i), c + i * classes.step, batch[i]);
      }
    }
    logits.first = logits.at(kBatch);
    grad.first = grad.at(kBatch);
  }
}

// A block's shared memory. Every thread can have sums of rows.
template <typename T>
struct BundleMemory {
  using A = Acc<T>;

  BundleState<T>* states;
  RowSums* sums;
  TileRow<A>* rows;
  BundlePiece<T>* kept;

  CE_DEVICE explicit BundleMemory(const Plan& plan)
      : states(static_cast<BundleState<T>*>(shared_memory())),
        sums(reinterpret_cast<RowSums*>(states + count_of_states(plan))),
        rows(reinterpret_cast<TileRow<A>*>(sums + count_of_sums(plan))),
        kept(reinterpret_cast<BundlePiece<T>*>(rows + plan.rows() * kBundle<T>)) {}

  static int64_t bytes(const Plan& plan) {
    return count_of_states(plan) * sizeof(BundleState<T>) + count_of_sums(plan) * sizeof(RowSums) +
           plan.rows() * kBundle<T> * sizeof(TileRow<A>) +
           static_cast<int64_t>(plan.kept) * plan.threads * sizeof(BundlePiece<T>);
  }

 private:
  CE_HOST_DEVICE static int count_of_states(const Plan& plan) { return plan.lanes > 1 ? plan.threads : 0; }
  CE_HOST_DEVICE static int count_of_sums(const Plan& plan) { return plan.sums ? plan.threads : 0; }
};

template <typename A>
CE_DEVICE GradientParts<A> parts_of(const RowGradient<A>& row, const RowTarget<A>& target) {
  return {row.max, row.scale, row.upstream * target.coefficient, static_cast<int>(target.index)};
}

// Calls f(row, tile_row) for this thread's rows of a tile, whose first bundle is `first`.
template <typename T, typename F>
CE_DEVICE void for_each_row(const Problem& p, const Plan& plan, int64_t first, TileRow<Acc<T>>* rows, F&& f) {
  const int64_t left = p.rows - first * kBundle<T>;
  const int count = static_cast<int>(left < plan.rows() * kBundle<T> ? left : plan.rows() * kBundle<T>);
  CE_NO_UNROLL for (int i = threadIdx.x; i < count; i += plan.threads) {
    f(first * kBundle<T> + i, rows[i]);
  }
}

template <typename T>
CE_DEVICE bool is_any_kept(const Problem& p, int64_t row) {
  bool result = false;
  CE_NO_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
    result |= judge(p, index_of(p, row + r)) != Verdict::kIgnored;
  }
  return result;
}

// `kKeeps` tells whether a bundle waits in shared memory, which a gradient needs; others are read as they are summed.
template <typename T, bool kKeeps>
__global__ void __launch_bounds__(kBundleThreads, kKeeps ? 5 : 4)
    rows_of_bundles(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using A = Acc<T>;
  constexpr int kBatch = 8;  // pieces that a thread has under way together, where they are not kept
  const BundleMemory<T> shared(plan);
  BundlePiece<T>* const kept = shared.kept + threadIdx.x;
  const Seat seat = Across<T>::seat(plan);

  let_next_start();
  if (!finds_divisor_before(p)) {
    wait_for_previous();
  }
  if (plan.sums) {
    shared.sums[threadIdx.x] = RowSums();
  }
  // Every thread goes through every turn, with or without a bundle: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows / kBundle<T>; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows / kBundle<T>;
    const int64_t row = (exists ? first + seat.row : first) * kBundle<T>;
    const bool reads = exists && (plan.reads_all || reads_ignored_rows(p) || is_any_kept<T>(p, row));
    const Classes classes(seat, reads ? p.classes : 0);
    const BundlePieces<const T> logits(p, p.logits, row, classes);
    BundleState<T> state;
    if constexpr (kKeeps) {
      CE_UNROLL_BY(4) for (int turn = 0; turn < classes.count; ++turn) {
        copy_async(reinterpret_cast<uint4*>(kept + turn * plan.threads),
                   reinterpret_cast<const uint4*>(logits.at(turn)));
      }
    }
    for_each_row<T>(p, plan, first, shared.rows, [&](int64_t of, TileRow<A>& tile_row) {
      if (p.target_type == TargetType::kInt64) {
        copy_async(&tile_row.row.index,
                   static_cast<const int64_t*>(p.target.data) + row_offset(p, of, p.target.strides));
      } else {
        tile_row.row.index = index_of(p, of);
      }
    });
    commit_copies();
    if constexpr (kKeeps) {
      wait_for_copies(0);
      if (classes.count > 0) {
        state.template push<4>(classes.count, [&](int turn) { return kept[turn * plan.threads]; });
      }
    } else {
      int turn = 0;
      const auto push_some = [&](auto count) {
        BundlePiece<T> batch[count()];
        CE_UNROLL for (int i = 0; i < count; ++i) {
          batch[i] = load<T, kBundle<T>>(logits.at(turn + i));
        }
        state.template push<count()>(count, [&](int i) { return batch[i]; });
        turn += count;
      };
      CE_NO_UNROLL while (turn + kBatch <= classes.count) {
        push_some(std::integral_constant<int, kBatch>());
      }
      CE_NO_UNROLL while (turn < classes.count) {
        push_some(std::integral_constant<int, 1>());
      }
      wait_for_copies(0);
    }
    state = sum_in_block<Across<T>, false>(state, plan, shared.states);
    if (seat.lane == 0) {
      CE_UNROLL for (int r = 0; r < kBundle<T>; ++r) {
        shared.rows[seat.row * kBundle<T> + r].row.exps = state.rows[r];
      }
    }
    __syncthreads();
    if (kKeeps && p.grad.data) {
      wait_for_previous();  // which has found the divisor meanwhile
    }
    for_each_row<T>(p, plan, first, shared.rows, [&](int64_t of, TileRow<A>& tile_row) {
      const RowState<A> row_state{tile_row.row.exps};
      if (!kKeeps && plan.blocks > 1) {
        Workspace(p.workspace).template parts<RowState<A>>()[of * plan.blocks + seat.block] = row_state;
        return;
      }
      const RowTarget<A> target = target_of<false, A>(p, of, tile_row.row.index);
      A z_target = 0;
      if (target.index >= 0) {
        // The block's threads keep a piece of each class in turn.
        const int64_t place = target.index * plan.rows() * kBundle<T> + (of - first * kBundle<T>);
        z_target = kKeeps ? A(to_accumulator(reinterpret_cast<const T*>(shared.kept)[place]))
                          : given_logit<A, T>(p, of, target.index);
      }
      finish<false>(p, of, target, z_target, row_state, plan.sums ? &shared.sums[threadIdx.x] : nullptr);
      if (kKeeps && p.grad.data) {
        const RowUpstream<A> upstream{upstream_of(p, of, A(1))};
        tile_row.gradient =
            target.kept
                ? parts_of(make_row_gradient<A>(row_state.exps, target.coefficient, A(p.z_loss), upstream), target)
                : GradientParts<A>::zeros();
      }
    });
    __syncthreads();
    if constexpr (kKeeps) {
      if (p.grad.data) {
        const Classes written(seat, exists ? p.classes : 0);
        write_bundle<1>(BundlePieces<T>(p, p.grad, row, written), BundlePieces<const T>(kept, plan), written,
                        shared.rows + seat.row * kBundle<T>);
        __syncthreads();
      }
    }
  }
  wait_for_previous();  // in any case: whoever comes next takes both for done
  if (plan.sums) {
    sum_tile<A>(p, plan, seat, shared.sums, plan.threads);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBundleThreads, 5)
    gradient_of_bundles(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using A = Acc<T>;
  TileRow<A>* const rows = static_cast<TileRow<A>*>(shared_memory());
  const Seat seat = Across<T>::seat(plan);
  wait_for_previous();
  for (int64_t first = first_row(plan); first < p.rows / kBundle<T>; first += row_step(plan)) {
    for_each_row<T>(p, plan, first, rows, [&](int64_t of, TileRow<A>& tile_row) {
      const RowTarget<A> target = target_of<false, A>(p, of, index_of(p, of));
      if (target.kept || reaches_ignored_rows(p)) {
        const A coefficients = p.coefficients ? static_cast<const A*>(p.coefficients)[row_offset(p, of, p.row_strides)]
                                              : target.coefficient;
        const RowUpstream<A> upstream = upstream_of_row(p, of, target);
        tile_row.gradient =
            parts_of(make_row_gradient<A>(exps_of<A>(p, of), coefficients, A(p.z_loss), upstream), target);
      } else {
        tile_row.gradient = GradientParts<A>::zeros();
      }
    });
    __syncthreads();
    if (const int64_t row = (first + seat.row) * kBundle<T>; row < p.rows) {
      const Classes classes(seat, p.classes);
      write_bundle<4>(BundlePieces<T>(p, p.grad, row, classes), BundlePieces<const T>(p, p.logits, row, classes),
                      classes, rows + seat.row * kBundle<T>);
    }
    __syncthreads();
  }
}

// Calls f with a value of the elements' type, of which a bundle has more than two.
template <typename F>
void dispatch_bundles(const Problem& p, F&& f) {
  dispatch(p.dtype, [&](auto element) {
    if constexpr (sizeof(element) <= sizeof(float)) {
      f(element);
    }
  });
}

}  // namespace

int64_t memory_of_bundles(const Problem& p, const Plan& plan) {
  int64_t bytes = 0;
  dispatch_bundles(p, [&](auto element) { bytes = BundleMemory<decltype(element)>::bytes(plan); });
  return bytes;
}

void forward_bundles(const Problem& p, const Plan& plan, Stream stream) {
  dispatch_bundles(p, [&](auto element) {
    using T = decltype(element);
    Grid grid{blocks_for(p, plan), plan.threads};
    grid.early = true;
    grid.shared = memory_of_bundles(p, plan);
    launch(plan.kept > 0 ? rows_of_bundles<T, true> : rows_of_bundles<T, false>, grid, stream, p, plan);
  });
}

void backward_bundles(const Problem& p, const Plan& plan, Stream stream) {
  dispatch_bundles(p, [&](auto element) {
    using T = decltype(element);
    Grid grid{blocks_for(p, plan), plan.threads};
    grid.early = true;
    grid.shared = plan.rows() * kBundle<T> * sizeof(TileRow<Acc<T>>);
    launch(gradient_of_bundles<T>, grid, stream, p, plan);
  });
}

}  // namespace ce::cuda
