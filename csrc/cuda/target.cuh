// What a row's target asks of the loss: its coefficients, its upstream gradient.
#pragma once

#include "../picks.h"
#include "row.cuh"
#include "workspace.h"

namespace ce::cuda {

enum class Verdict { kKept, kIgnored, kOutOfBounds };

template <typename P>
CE_DEVICE Verdict judge(const P& p, int64_t target) {
  return target == p.ignore_index      ? Verdict::kIgnored
         : is_out_of_bounds(p, target) ? Verdict::kOutOfBounds
                                       : Verdict::kKept;
}

template <typename A, typename P>
CE_DEVICE A class_weight(const P& p, int64_t c) {
  return p.weight ? static_cast<const A*>(p.weight)[c] : A(1);
}

// The weight of a kept target's class, if it is the problem's own.
template <typename A, typename P>
CE_DEVICE A weight_of_target(const P& p, int64_t target) {
  const int64_t c = own_class(p, target);
  return c < 0 ? A(0) : class_weight<A>(p, c);
}

// A row's index as it is, 0 where there are none.
template <typename P>
CE_DEVICE int64_t index_of(const P& p, int64_t row) {
  return has_indices(p) ? read_target(p, row) : 0;
}

template <typename A>
struct RowTarget {
  int64_t index = -1;  // none: ignored, out of bounds, another shard's, or the target has classes itself
  A coefficient = 0;   // that only the index has; NaN out of bounds, so that loss and gradient become NaN
  bool kept = false;

  RowTarget() = default;
  // `value` is what index_of() has read, `keep` that of the smoothing.
  template <typename P>
  CE_DEVICE RowTarget(const P& p, int64_t value, A keep) : kept(true) {
    if (has_indices(p)) {
      const Verdict verdict = judge(p, value);
      kept = verdict != Verdict::kIgnored;
      if (verdict == Verdict::kKept) {
        index = own_class(p, value);
        coefficient = index < 0 ? A(0) : keep * class_weight<A>(p, index);
      } else if (verdict == Verdict::kOutOfBounds) {
        coefficient = NAN;
      }
    }
  }

  CE_DEVICE bool is_out_of_bounds() const { return index < 0 && coefficient != coefficient; }
};

// The same in a kernel that is `kGeneral`.
template <bool kGeneral, typename A, typename P>
CE_DEVICE RowTarget<A> target_of(const P& p, int64_t row, int64_t value) {
  RowTarget<A> target(p, value, kGeneral ? smoothing_of<A>(p).keep : A(1));
  if (kGeneral && p.picks > 0) {
    target.kept = counts<A>(p, row);
  }
  return target;
}

// Whether a call asks for more than the loss of an index: coefficients of other classes, transformed logits, the states
// of shards.
inline bool is_general(const Problem& p) {
  return has_coefficients(p) || transforms(p) || p.linear || p.picks > 0;
}

// The logits of the loss, in a kernel that is `kGeneral`.
template <bool kGeneral, typename T, int kSize>
CE_DEVICE void unpack_logits(const Piece<T, kSize>& piece, const LogitTransform<Acc<T>>& transform,
                             Acc<T> (&z)[kSize]) {
  unpack(piece, z);
  if (kGeneral && transform.is_given()) {
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      z[i] = apply(transform, z[i]);
    }
  }
}

// A call that asks for the loss of int64 indices and for nothing besides, in rows that lie on one line. A kernel for it
// knows so when it is compiled: it is much shorter, and there is less to fetch before the first logit is read.
struct PlainProblem : Problem {
  explicit PlainProblem(const Problem& p) : Problem(p) {}

  static bool is(const Problem& p) {
    return p.dims <= 1 && p.target_type == TargetType::kInt64 && p.logits.class_stride == 1 && !p.weight &&
           !p.row_weight.data && p.all_classes == 0 && p.z_loss == 0 && !is_general(p);
  }

  // In place of what the problem has by these names.
  static constexpr int dims = 1;
  static constexpr TargetType target_type = TargetType::kInt64;
  static constexpr int64_t picks = 0, first_class = 0, all_classes = 0;
  static constexpr const void* weight = nullptr;
  static constexpr Absent row_weight = {};
  static constexpr double z_loss = 0;
};

// Calls f with a plain problem if it is one; of float64 there are no kernels for those.
template <typename T, typename F>
void dispatch_plain(const Problem& p, F&& f) {
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (PlainProblem::is(p)) {
      f(PlainProblem(p));
      return;
    }
  }
  f(p);
}

// Of backward kernels.
inline bool is_general_backward(const Problem& p) {
  return is_general(p) || p.grad_log_prob.data || p.grad_entropy.data;
}

// Waits for other threads that report, and only for them.
CE_DEVICE void report(BadTarget* record, int64_t row, int64_t target) {
  const auto reported = reinterpret_cast<unsigned long long*>(&record->row);
  const auto mine = static_cast<unsigned long long>(row);
  while (atomicAdd(reported, 0) > mine) {
    if (atomicCAS(&record->lock, 0, 1) == 0) {
      __threadfence_system();
      if (atomicAdd(reported, 0) > mine) {
        record->target = target;
        __threadfence_system();
        atomicExch(reported, mine);
      }
      __threadfence_system();
      atomicExch(&record->lock, 0);
    }
  }
}

// The coefficients that a row's classes have besides that of an index.
template <typename T>
class Coefficients {
 public:
  using A = Acc<T>;

  template <typename Walk>
  CE_DEVICE Coefficients(const Problem& p, int64_t row, const Walk& walk)
      : weight_(static_cast<const A*>(p.weight)),
        smoothing_(smoothing_of<A>(p)),
        has_probabilities_(p.target_type == TargetType::kProbabilities),
        probabilities_(
            has_probabilities_ ? static_cast<const T*>(p.target.data) + row_offset(p, row, p.target.strides) : nullptr,
            p.target.class_stride, walk) {}

  template <int kSize>
  CE_DEVICE void read(int64_t c, A (&coefficients)[kSize]) const {
    if (has_probabilities_) {
      T q[kSize];
      probabilities_.read(c, q);
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        coefficients[i] = smoothing_.coefficient(weight_of(c + i), A(to_accumulator(q[i])));
      }
    } else {
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        coefficients[i] = smoothing_.uniform == 0 ? A(0) : smoothing_.background(weight_of(c + i));
      }
    }
  }

 private:
  CE_DEVICE A weight_of(int64_t c) const { return weight_ ? weight_[c] : A(1); }

  const A* weight_;
  Smoothing<A> smoothing_;
  bool has_probabilities_;
  Companion<const T> probabilities_;
};

// What the forward pass has found of a row.
template <typename A>
CE_DEVICE MaxSum<A> exps_of(const Problem& p, int64_t row) {
  const int64_t offset = row_offset(p, row, p.row_strides);
  return {static_cast<const A*>(p.max)[offset], static_cast<const A*>(p.sum)[offset]};
}

template <typename A>
CE_DEVICE A divisor_of(const Problem& p) {
  return p.divides_by_weight ? *Workspace(p.workspace).template divisor<A>() : value_of<A>(p.divisor);
}

// The upstream gradient of a row's loss from that of the reduction: with its weight, over the divisor.
template <typename A, typename P>
CE_DEVICE A upstream_of(const P& p, int64_t row, A of_reduction) {
  return of_reduction * row_value<A>(p, p.row_weight, row, 1) / divisor_of<A>(p);
}
template <typename A>
CE_DEVICE A upstream_of(const Problem& p, int64_t row) {
  const Input& grad = p.grad_loss;
  return upstream_of(
      p, row, grad.data ? A(load_as_double(grad.data, row_offset(p, row, grad.strides), p.grad_loss_type)) : A(1));
}
// What reaches a row's loss and its log-sum-exp.
template <typename A>
CE_DEVICE RowUpstream<A> upstream_of_row(const Problem& p, int64_t row, const RowTarget<A>& target) {
  RowUpstream<A> upstream;
  upstream.loss = target.kept ? upstream_of<A>(p, row) : A(0);
  upstream.lse = row_value<A>(p, p.grad_lse, row, 0);
  return upstream;
}

// The gradient of the formula's logits z, of a piece of a row from class c on, but for the part that only the target
// has.
template <bool kGeneral, typename T, int kSize, typename A = Acc<T>>
CE_DEVICE void gradient_of_logits(int64_t c, const A (&z)[kSize], const Coefficients<T>& coefficients,
                                  const RowGradient<A>& row, A (&values)[kSize]) {
  A a[kSize] = {};
  if constexpr (kGeneral) {
    coefficients.read(c, a);
  }
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    const A exp = exponential(z[i] - row.max);
    const A factor = kGeneral ? row.scale + row.tilt * std::fmax(z[i] - row.max, -Moment<A>::kFarthest) : row.scale;
    values[i] = kGeneral ? row.element(exp, a[i], factor, row.upstream) : factor * exp;
  }
}

// Adds that part.
template <int kSize, typename A>
CE_DEVICE void add_target(int64_t c, const RowTarget<A>& target, const RowGradient<A>& row, A (&values)[kSize]) {
  if (target.index >= c && target.index - c < kSize) {
    const int at = static_cast<int>(target.index - c);
    const A own = std::fma(row.upstream, target.coefficient, -row.log_prob);  // see RowGradient::element()
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      values[i] -= i == at ? own : A(0);
    }
  }
}

// Writes that of the logits as they are given, in a piece of one element with the target's part, see TargetPlace.
template <bool kGeneral, typename T, int kSize>
CE_DEVICE void write_gradient(const Companion<T>& grad, int64_t c, const Piece<T, kSize>& piece,
                              const RowTarget<Acc<T>>& target, const Coefficients<T>& coefficients,
                              const LogitTransform<Acc<T>>& transform, const RowGradient<Acc<T>>& row) {
  using A = Acc<T>;
  A z[kSize], values[kSize];
  unpack_logits<kGeneral>(piece, transform, z);
  gradient_of_logits<kGeneral>(c, z, coefficients, row, values);
  if constexpr (kSize == 1) {
    add_target(c, target, row, values);
  }
  if (kGeneral && transform.is_given()) {
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      values[i] *= transform.cap > 0 ? transform.scale * transform.slope(z[i]) : transform.scale;
    }
  }
  grad.write(c, pack<T, kSize>(values));
}

// The target's element where it lies in a whole piece, for the thread whose piece it is: it writes the element once
// more after the piece, which saves looking for the target in every piece.
template <typename Walk>
class TargetPlace {
 public:
  using T = typename Walk::Element;

  CE_DEVICE TargetPlace(const Walk& walk, const Seat& seat, int64_t target) : class_(target) {
    const int64_t place = target - walk.class_of(0);
    const int64_t piece = place / Walk::kSize;
    if (Walk::kSize > 1 && target >= 0 && place >= 0 && piece < walk.pieces() &&
        (piece & ((1 << seat.bits) - 1)) == seat.rank) {
      turn_ = static_cast<int>(piece >> seat.bits);
      element_ = static_cast<int>(place % Walk::kSize);
    }
  }

  CE_DEVICE bool is_mine() const { return turn_ >= 0; }
  CE_DEVICE int64_t class_of() const { return class_; }
  CE_DEVICE int turn() const { return turn_; }        // of this thread's
  CE_DEVICE int element() const { return element_; }  // of the piece

 private:
  int64_t class_;
  int turn_ = -1, element_ = 0;
};

// How write_row() gets the pieces of a row from memory.
template <typename Walk>
struct FromMemory {
  using T = typename Walk::Element;
  const Walk& walk;

  CE_DEVICE Piece<T, Walk::kSize> operator()(int64_t c, int) const { return walk.template read<Walk::kSize>(c); }
  CE_DEVICE Piece<T, 1> element(const TargetPlace<Walk>& place) const {
    return walk.template read<1>(place.class_of());
  }
};

// Writes 0 to this thread's part of a row of gradients.
template <typename Walk, typename T = typename Walk::Element>
CE_DEVICE void write_zeros(const Walk& walk, const Seat& seat, const Companion<T>& grad) {
  CE_NO_UNROLL for (int edge = seat.rank; edge < walk.edges(); edge += 1 << seat.bits) {
    grad.write(walk.class_of_edge(edge), Piece<T, 1>());
  }
  const Turns<Walk> turns(walk, seat);
  CE_NO_UNROLL for (int turn = 0; turn < turns.count; ++turn) {
    grad.write(turns.class_of(turn), Piece<T, Walk::kSize>());
  }
}

// Writes the gradient of a kept row, whose whole pieces `read` gets.
template <bool kGeneral, int kBatch, typename Walk, typename Read, typename T = typename Walk::Element>
CE_DEVICE void write_row(const Walk& walk, const Seat& seat, Read&& read, const RowTarget<Acc<T>>& target,
                         const Coefficients<T>& coefficients, const LogitTransform<Acc<T>>& transform,
                         const RowGradient<Acc<T>>& gradient, const Companion<T>& grad) {
  using A = Acc<T>;
  const auto write = [&](int64_t c, const auto& piece) {
    write_gradient<kGeneral>(grad, c, piece, target, coefficients, transform, gradient);
  };
  // Where the gradient replaces the logits, the target's has to be read before. Its place is found anew after the loop,
  // rather than kept in registers all along.
  Piece<T, 1> logit = {};
  if (const TargetPlace<Walk> place(walk, seat, target.index); place.is_mine()) {
    logit = read.element(place);
  }
  const Exponentials<A> exponentials(gradient.max);
  constexpr bool kPlain = !kGeneral && Walk::kSize > 1;
  if (kPlain && grad.is_whole() && exponentials.apply()) {
    const A scale = gradient.scale / exponentials.unit();
    const Turns<Walk> turns(walk, seat);
    for_each_batch<kBatch>(turns, 0, turns.count, read, [&](int64_t c, const auto& batch, auto count) {
      T* const written = grad.address(0) + c;
      CE_UNROLL for (int i = 0; i < kBatch; ++i) {
        if (i < count) {
          A z[Walk::kSize], values[Walk::kSize];
          unpack(batch[i], z);
          CE_UNROLL for (int j = 0; j < Walk::kSize; ++j) {
            values[j] = scale * exponentials.power(z[j]);
          }
          store(written + i * turns.step, pack<T, Walk::kSize>(values));
        }
      }
    });
    for_each_edge(walk, seat, write);
  } else {
    for_each_piece<kPlain ? 1 : kBatch>(walk, seat, read, write);
  }
  if (TargetPlace<Walk>(walk, seat, target.index).is_mine()) {
    write(target.index, logit);
  }
}

}  // namespace ce::cuda
