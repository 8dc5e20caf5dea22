// Divergences from a teacher in one read of both rows of logits, and the gradients of either; row_divergence.h has
// their formulas.

#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {
namespace {

// Of pieces z of the logits and t of the teacher's.
template <typename A, int kSize>
CE_DEVICE void push(RowDivergence<A>& row, const A (&z)[kSize], const A (&t)[kSize], bool reverse) {
  A of[kSize], from[kSize];
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    of[i] = reverse ? z[i] : t[i];
    from[i] = reverse ? t[i] : z[i];
  }
  A top_of = row.of.max, top_from = row.from.max;
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    top_of = std::fmax(top_of, of[i]);
    top_from = std::fmax(top_from, from[i]);
  }
  if (top_of > row.of.max || top_from > row.from.max) {
    row.raise(top_of, top_from);
  }
  const A of_reference = row.of.reference(), from_reference = row.from.reference();
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    const A u = of[i] - of_reference, v = from[i] - from_reference;
    const A exp = exponential(u);
    row.of.sum += exp;
    row.from.sum += exponential(v);
    row.cross += RowDivergence<A>::term(exp, u, v, row.kappa);
  }
}

// A row of the teacher's logits, taken where a walk over the logits happens to be.
template <typename T>
class TeacherRow {
 public:
  using A = Acc<T>;

  template <typename Walk>
  CE_DEVICE TeacherRow(const Problem& p, int64_t row, const Walk& walk)
      : elements_(static_cast<const T*>(p.target.data) + row_offset(p, row, p.target.strides), p.target.class_stride,
                  walk),
        scale_(A(p.teacher_scale)) {}

  template <int kSize>
  CE_DEVICE void read(int64_t c, A (&t)[kSize]) const {
    T elements[kSize];
    elements_.read(c, elements);
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      t[i] = to_accumulator(elements[i]) * scale_;
    }
  }

 private:
  Companion<const T> elements_;
  A scale_;
};

template <typename A>
CE_DEVICE void finish(const Problem& p, int64_t row, const RowDivergence<A>& divergence) {
  const int64_t offset = row_offset(p, row, p.row_strides);
  const auto write = [&](void* results, A value) {
    if (results) {
      static_cast<A*>(results)[offset] = value;
    }
  };
  const MaxSum<A> logits = divergence.logits(p.reverse), teacher = divergence.teacher(p.reverse);
  write(p.max, logits.max);
  write(p.sum, logits.sum);
  write(p.teacher_max, teacher.max);
  write(p.teacher_sum, teacher.sum);
  write(p.mean, divergence.mean());
  const A loss = divergence.value() + z_loss_of(logits, logits.log_sum(), A(p.z_loss));
  write(p.loss, counts<A>(p, row) ? loss : A(0));
}

// The gradient of the given logits or, `of_teacher`, of the teacher's, of which z and t are pieces as the formulas have
// them.
template <typename T, int kSize, typename A = Acc<T>>
CE_DEVICE void write_gradient(const Problem& p, const Companion<T>& grad, int64_t c, const A (&z)[kSize],
                              const A (&t)[kSize], bool of_teacher, const LogitTransform<A>& transform,
                              const DivergenceGradient<A>& row) {
  const bool is_of = of_teacher != p.reverse;
  const A kappa = A(p.kappa);
  A values[kSize];
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    const A u = (of_teacher ? t[i] : z[i]) - row.own_max, v = (of_teacher ? z[i] : t[i]) - row.other_max;
    const A exp = exponential(u);
    A value = is_of ? row.element_of(exp, u, v, kappa, row.scale, row.tilt)
                    : row.element_from(exp, exponential(v), row.scale, row.upstream);
    value *= transform.scale;
    value = transform.cap > 0 ? value * transform.slope(z[i]) : value;
    values[i] = value;
  }
  grad.write(c, pack<T, kSize>(values));
}

template <typename Walk>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2>)
    divergence_rows(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  using Whole = Piece<T, Walk::kSize>;
  const LogitTransform<A> transform = transform_of<A>(p);
  Whole* const kept = static_cast<Whole*>(shared_memory()) + threadIdx.x;  // first: they are aligned to their size
  RowDivergence<A>* const states =
      reinterpret_cast<RowDivergence<A>*>(static_cast<Whole*>(shared_memory()) + plan.kept * plan.threads);

  const Seat seat = Walk::seat(plan);
  // Every thread goes through every turn, with or without a row: the reductions need it.
  for (int64_t first = first_row(plan); first < p.rows; first += row_step(plan)) {
    const bool exists = first + seat.row < p.rows;
    const int64_t row = exists ? first + seat.row : first;
    const bool is_read = exists && counts<A>(p, row);
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride,
                    is_read ? p.classes : 0);
    const TeacherRow<T> teacher(p, row, walk);
    RowDivergence<A> state;
    state.kappa = A(p.kappa);
    const auto read = [&](int64_t c, int turn) {
      const Whole whole = walk.template read<Walk::kSize>(c);
      if (plan.kept > 0) {
        kept[turn * plan.threads] = whole;
      }
      return whole;
    };
    for_each_piece<2>(walk, seat, read, [&](int64_t c, const auto& piece) {
      constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
      A z[kSize], t[kSize];
      unpack_logits<true>(piece, transform, z);
      teacher.read(c, t);
      push(state, z, t, p.reverse);
    });
    state = sum_in_block<Walk, true>(state, plan, states);
    if (plan.cluster) {
      state = sum_in_cluster<true>(state, plan, states);
    } else if (plan.blocks > 1) {
      if (seat.lane == 0 && exists) {
        Workspace(p.workspace).template parts<RowDivergence<A>>()[row * plan.blocks + seat.block] = state;
      }
      continue;
    }
    if (seat.rank == 0 && exists) {
      finish(p, row, state);
    }
    if (p.grad.data) {
      const Walk out(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride,
                     exists ? p.classes : 0);
      const DivergenceGradient<A> gradient =
          divergence_gradient_of<A>(p, state.logits(p.reverse), state.teacher(p.reverse), state.mean(),
                                    is_read ? upstream_of<A>(p, row) : A(0), /*of_teacher=*/false);
      const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                              out);
      const auto read_again = [&](int64_t c, int turn) {
        return plan.kept > 0 ? kept[turn * plan.threads] : out.template read<Walk::kSize>(c);
      };
      if (is_read) {
        for_each_piece<1>(out, seat, read_again, [&](int64_t c, const auto& piece) {
          constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
          A z[kSize], t[kSize];
          unpack_logits<true>(piece, transform, z);
          teacher.read(c, t);
          write_gradient<T>(p, grad, c, z, t, /*of_teacher=*/false, transform, gradient);
        });
      } else {
        write_zeros(out, seat, grad);
      }
    }
    if (plan.cluster) {
      leave_cluster();
    }
  }
}

// What blocks have found of the rows that they share, a warp for each row.
template <typename A>
__global__ void __launch_bounds__(kMaxThreads)
    merge_divergences(const __grid_constant__ Problem p, const __grid_constant__ int blocks) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (row >= p.rows) {
    return;
  }
  const RowDivergence<A>* const parts = Workspace(p.workspace).template parts<RowDivergence<A>>() + row * blocks;
  RowDivergence<A> state;
  state.kappa = A(p.kappa);
  for (int part = threadIdx.x % kWarp; part < blocks; part += kWarp) {
    state = state.merge(parts[part]);
  }
  state = sum_of_lanes<true>(state, kWarp);
  if (threadIdx.x % kWarp == 0) {
    finish(p, row, state);
  }
}

template <typename Walk>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<typename Walk::Element, 2>)
    divergence_gradient(const __grid_constant__ Problem p, const __grid_constant__ Plan plan,
                        const __grid_constant__ bool of_teacher) {
  using T = typename Walk::Element;
  using A = Acc<T>;
  const LogitTransform<A> transform = transform_of<A>(p);
  const LogitTransform<A> own_transform = of_teacher ? teacher_transform_of<A>(p) : transform;
  const Seat seat = Walk::seat(plan);
  for (int64_t row = first_row(plan) + seat.row; row < p.rows; row += row_step(plan)) {
    const bool is_read = counts<A>(p, row);
    const Walk walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, p.classes);
    const TeacherRow<T> teacher(p, row, walk);
    const int64_t offset = row_offset(p, row, p.row_strides);
    const auto value = [&](const void* rows) { return static_cast<const A*>(rows)[offset]; };
    const DivergenceGradient<A> gradient =
        divergence_gradient_of<A>(p, {value(p.max), value(p.sum)}, {value(p.teacher_max), value(p.teacher_sum)},
                                  value(p.mean), is_read ? upstream_of<A>(p, row) : A(0), of_teacher);
    const Companion<T> grad(static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides), p.grad.class_stride,
                            walk);
    if (!is_read) {
      write_zeros(walk, seat, grad);
      continue;
    }
    for_each_piece<2>(
        walk, seat, [&](int64_t c, int) { return walk.template read<Walk::kSize>(c); },
        [&](int64_t c, const auto& piece) {
          constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
          A z[kSize], t[kSize];
          unpack_logits<true>(piece, transform, z);
          teacher.read(c, t);
          write_gradient<T>(p, grad, c, z, t, of_teacher, own_transform, gradient);
        });
  }
}

template <typename Walk>
void launch_divergence(const Problem& p, const Plan& plan, Stream stream) {
  using A = Acc<typename Walk::Element>;
  const bool merges = plan.blocks > 1 && !plan.cluster;
  Grid grid{blocks_for(p, plan), plan.threads, plan.cluster ? plan.blocks : 1};
  grid.shared = shared_states<Walk>(plan) * sizeof(RowDivergence<A>) +
                static_cast<int64_t>(plan.kept) * plan.threads * sizeof(Piece<typename Walk::Element, Walk::kSize>);
  launch(divergence_rows<Walk>, grid, stream, p, plan);
  if (merges) {
    constexpr int kRows = 8;  // of a block
    launch(merge_divergences<A>, {(p.rows + kRows - 1) / kRows, kRows * kWarp}, stream, p, plan.blocks);
  }
}

}  // namespace

void diverge(const Problem& p, const Plan& plan, Stream stream) {
  dispatch_walk(p, [&](auto* type) { launch_divergence<std::remove_pointer_t<decltype(type)>>(p, plan, stream); });
}

void map_divergence_gradient(const Problem& p, const Plan& plan, bool of_teacher, Stream stream) {
  dispatch_walk(p, [&](auto* type) {
    launch(divergence_gradient<std::remove_pointer_t<decltype(type)>>, {blocks_for(p, plan), plan.threads}, stream, p,
           plan, of_teacher);
  });
}

}  // namespace ce::cuda
