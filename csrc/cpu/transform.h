// What makes the logits of the formula of the given ones, in vectors. Included by tile_kernels.h, so without a guard.

namespace ce::cpu::CE_ISA {

// What makes the logits of the formula of the given ones, as far as a kernel is compiled for it alone.
enum class Change { kNone, kScale, kSoftcap, kAny };

template <typename A>
struct AsGiven {
  static constexpr A scale = 1;
  explicit AsGiven(const Problem&) {}
};
template <typename A, Change kChange = Change::kAny>
struct Transformed : LogitTransform<A> {
  Softcap<A> softcap;

  explicit Transformed(const Problem& p) : Transformed(transform_of<A>(p)) {}
  explicit Transformed(LogitTransform<A> transform)
      : LogitTransform<A>(transform), softcap(transform.before_tanh(), transform.cap) {}

  CE_INLINE bool caps() const { return kChange == Change::kAny ? this->cap > 0 : kChange == Change::kSoftcap; }
};
template <typename A, Change kChange>
using Transform = std::conditional_t<kChange == Change::kNone, AsGiven<A>, Transformed<A, kChange>>;

// What is kept of an exponential for the gradient: it has the transform's slope in it, in units of unit_of_kept().
template <typename A>
CE_INLINE Vec<A> kept_exp(const AsGiven<A>&, Vec<A> e, Vec<A>) {
  return e;
}
template <typename A, Change kChange>
CE_INLINE Vec<A> kept_exp(const Transformed<A, kChange>& transform, Vec<A> e, Vec<A> z) {
  return transform.caps() ? e * ((transform.cap - z) * (transform.cap + z)) : e;
}
template <typename A>
CE_INLINE A unit_of_kept(const AsGiven<A>&) {
  return 1;
}
template <typename A, Change kChange>
CE_INLINE A unit_of_kept(const Transformed<A, kChange>& transform) {
  return transform.caps() ? 1 / (transform.cap * transform.cap) : A(1);
}

// From vectors of logits as they are given to those of the formula.
template <typename A, int kCount>
CE_INLINE void apply(const AsGiven<A>&, Vec<A> (&)[kCount]) {}
template <typename A, Change kChange, int kCount>
CE_INLINE void apply(const Transformed<A, kChange>& transform, Vec<A> (&x)[kCount]) {
  if (transform.caps()) {
    transform.softcap.apply(x);
  } else {
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      x[i] *= transform.scale;
    }
  }
}
template <typename TransformType, typename V>
CE_INLINE V applied(const TransformType& transform, V x) {
  V z[] = {x};
  apply(transform, z);
  return z[0];
}

// From the gradient of the formula's logits z, times the scale, to that of the given ones.
template <typename A>
CE_INLINE Vec<A> capped(const AsGiven<A>&, Vec<A> gradient, Vec<A>) {
  return gradient;
}
template <typename A, Change kChange>
CE_INLINE Vec<A> capped(const Transformed<A, kChange>& transform, Vec<A> gradient, Vec<A> z) {
  return transform.caps() ? gradient * transform.slope(z) : gradient;
}

}  // namespace ce::cpu::CE_ISA
