// Vectors of one instruction set: loads and stores that convert, and the exponential. Included by foreach_isa.h's
// rounds, so without a guard. GCC's and Clang's vector extensions, never wider than the instruction set's own.

namespace ce::cpu::CE_ISA {

#define CE_INLINE inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef int32_t Int32s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef uint32_t UInt32s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef int64_t Int64s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef uint64_t UInt64s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef uint16_t UInt16s __attribute__((vector_size(CE_VECTOR_BYTES / 2)));  // as many as a vector has floats

// exp(x) = 2^n · 2^f with n = round(x · log2 e). Adding `magic` leaves n plus the exponent's bias in the low bits.
// `polynomial` is the minimax polynomial of 2^f on [−½, ½] in relative error, held to 1 at 0, lowest degree first.
template <typename A>
struct Simd;

template <>
struct Simd<float> {
  using Vec = Floats;
  using Bits = UInt32s;
  using Mask = Int32s;
  static constexpr int kMantissa = 23;
  static constexpr float kMagic = 0x1.8p23f + 127;
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLowest = -88.02969193f;  // −127 ln 2: rounds to 2^−127, whose bits are those of 0
  static constexpr float kPolynomial[] = {1,
                                          0.693146977598992038f,
                                          0.240222420853767095f,
                                          0.0555073374347008527f,
                                          0.00967151263995645515f,
                                          0.00132647271400720133f};  // 9.2e-8
};

template <>
struct Simd<double> {
  using Vec = Doubles;
  using Bits = UInt64s;
  using Mask = Int64s;
  static constexpr int kMantissa = 52;
  static constexpr double kMagic = 0x1.8p52 + 1023;
  static constexpr double kLog2e = 1.44269504088896341;
  static constexpr double kLowest = -709.0895657128241;  // −1023 ln 2
  static constexpr double kPolynomial[] = {1,
                                           0.693147180559945326,
                                           0.240226506959101313,
                                           0.0555041086648200832,
                                           0.00961812910759412009,
                                           0.00133335581467746205,
                                           0.000154035304571120909,
                                           0.0000152527334931274893,
                                           1.3215435282308488e-6,
                                           1.0178199571842138e-7,
                                           7.0737832485031333e-9,
                                           4.43477129820037671e-10};  // 3.4e-18
};

template <typename A>
using Vec = typename Simd<A>::Vec;
template <typename A>
constexpr int kLanes = CE_VECTOR_BYTES / sizeof(A);

template <typename To, typename From>
CE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename A>
CE_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

// NaN in `b` is kept, NaN in `a` is not: the order of the operands of x86's max.
template <typename V>
CE_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

CE_INLINE bool any_greater(Floats a, Floats b) {
#if CE_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif CE_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)(a > b)) != 0;
#else
  const auto halves = bit_cast<Int64s>(a > b);
  return (halves[0] | halves[1]) != 0;
#endif
}

CE_INLINE bool any_greater(Doubles a, Doubles b) {
#if CE_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif CE_VECTOR_BYTES == 32
  return _mm256_movemask_pd((__m256d)(a > b)) != 0;
#else
  const Int64s mask = a > b;
  return (mask[0] | mask[1]) != 0;
#endif
}

template <typename A>
CE_INLINE A reduce_sum(Vec<A> v) {
  A lane[kLanes<A>];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lane[i] += lane[i + half];
    }
  }
  return lane[0];
}

template <typename A>
CE_INLINE A reduce_max(Vec<A> v) {
  A lane[kLanes<A>];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    }
  }
  return lane[0];
}

// addend + exp(x) for x ≤ 0; what would be a subnormal number is 0.
template <typename A>
CE_INLINE Vec<A> add_exp(Vec<A> x, Vec<A> addend) {
  using S = Simd<A>;
  constexpr int kDegree = sizeof(S::kPolynomial) / sizeof(A) - 1;
  x = max(broadcast(S::kLowest), x);
  const Vec<A> shifted = x * S::kLog2e + S::kMagic;
  const Vec<A> f = x * S::kLog2e + (S::kMagic - shifted);
  Vec<A> power = broadcast(S::kPolynomial[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) {
    power = power * f + S::kPolynomial[i];
  }
  const auto scale = bit_cast<Vec<A>>(bit_cast<typename S::Bits>(shifted) << S::kMantissa);
  return power * scale + addend;
}

template <typename A>
CE_INLINE Vec<A> exp(Vec<A> x) {
  return add_exp<A>(x, Vec<A>{});
}

// Loads and stores of kLanes adjacent elements.

template <typename V, typename T>
CE_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

CE_INLINE Floats load(const float* p) {
  return load_bits<Floats>(p);
}
CE_INLINE Doubles load(const double* p) {
  return load_bits<Doubles>(p);
}

CE_INLINE Floats load(const BFloat16* p) {
  return bit_cast<Floats>(__builtin_convertvector(load_bits<UInt16s>(p), UInt32s) << 16);
}

CE_INLINE Floats load(const Float16* p) {
#if CE_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p));
#elif CE_VECTOR_BYTES == 32
  return (Floats)_mm256_cvtph_ps(load_bits<__m128i>(p));
#else
  const UInt32s bits = __builtin_convertvector(load_bits<UInt16s>(p), UInt32s);
  // Scaling by 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included.
  const UInt32s finite = bit_cast<UInt32s>(bit_cast<Floats>((bits & 0x7fff) << 13) * 0x1p112f);
  const UInt32s special = (UInt32s)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return bit_cast<Floats>(finite | special | (bits & 0x8000) << 16);
#endif
}

CE_INLINE void store(float* p, Floats v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
CE_INLINE void store(double* p, Doubles v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

CE_INLINE void store(BFloat16* p, Floats v) {
  const UInt32s bits = bit_cast<UInt32s>(v);
  const UInt32s rounded = bits + 0x7fff + (bits >> 16 & 1);
  const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const UInt16s half = __builtin_convertvector((is_nan ? bits | 0x400000 : rounded) >> 16, UInt16s);
  __builtin_memcpy(p, &half, sizeof(half));
}

CE_INLINE void store(Float16* p, Floats v) {
#if CE_VECTOR_BYTES == 64
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif CE_VECTOR_BYTES == 32
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const UInt32s bits = bit_cast<UInt32s>(v);
  const UInt32s magnitude = bits & 0x7fffffff;
  // Normal: rebias the exponent and round to nearest even. Subnormal: adding ½ lets the addition do the rounding.
  const UInt32s normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  const UInt32s subnormal = bit_cast<UInt32s>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const UInt32s special = magnitude > 0x7f800000 ? UInt32s{} + 0x7e00 : UInt32s{} + 0x7c00;
  const UInt32s value = magnitude >= 0x477ff000 ? special : (magnitude < 0x38800000 ? subnormal : normal);
  const UInt16s half = __builtin_convertvector(value | (bits >> 16 & 0x8000), UInt16s);
#endif
  __builtin_memcpy(p, &half, sizeof(half));
}

// One vector whose lane i is the element at p[i · stride], for i < count; the other lanes are 0.
template <typename T>
CE_INLINE Vec<Acc<T>> load(const T* p, int64_t stride, int count) {
  if (__builtin_expect(stride == 1 && count == kLanes<Acc<T>>, 1)) {
    return load(p);
  }
  T lane[kLanes<Acc<T>>] = {};
  for (int i = 0; i < count; ++i) {
    lane[i] = p[i * stride];
  }
  return load(lane);
}

template <typename T>
CE_INLINE void store(T* p, int64_t stride, int count, Vec<Acc<T>> v) {
  if (__builtin_expect(stride == 1 && count == kLanes<Acc<T>>, 1)) {
    return store(p, v);
  }
  T lane[kLanes<Acc<T>>];
  store(lane, v);
  for (int i = 0; i < count; ++i) {
    p[i * stride] = lane[i];
  }
}

}  // namespace ce::cpu::CE_ISA
