// Vectors of one instruction set: loads and stores that convert, and the exponential. Included by foreach_isa.h's
// rounds, so without a guard. GCC's and Clang's vector extensions, never wider than the instruction set's own.

namespace ce::cpu::CE_ISA {

#define CE_INLINE inline __attribute__((always_inline))
#ifdef CE_SANITIZE
#define CE_UNROLL
#else
#define CE_UNROLL _Pragma("GCC unroll 16")
#endif

typedef float Floats __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef int32_t Int32s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef uint32_t UInt32s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef int64_t Int64s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef uint64_t UInt64s __attribute__((vector_size(CE_VECTOR_BYTES)));
typedef uint16_t UInt16s __attribute__((vector_size(CE_VECTOR_BYTES / 2)));  // as many as a vector has floats

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
  static constexpr int kArtanhTerms = 5;            // s² ≤ 0.0295
  static constexpr float kFarthest = 88.02969193f;  // 127 ln 2: rounds to 2^−127, whose bits are those of 0
};

template <>
struct Simd<double> {
  using Vec = Doubles;
  using Bits = UInt64s;
  using Mask = Int64s;
  static constexpr int kMantissa = 52;
  static constexpr double kMagic = 0x1.8p52 + 1023;
  static constexpr double kLog2e = 1.44269504088896341;
  static constexpr int kArtanhTerms = 10;
  static constexpr double kFarthest = 709.0895657128241;  // 1023 ln 2
};

// exp(−d) = 2^n · 2^f with n + f = −d · log2 e. AVX-512 splits this into n = floor(·) and f in [0, 1), the others into
// n = round(·) and f in [−½, ½]. The polynomials of 2^f are minimax in relative error, held to 1 at 0, lowest degree
// first; with their errors.
template <typename A, int kDegree>
constexpr A kPower2[] = {};
#if CE_VECTOR_BYTES == 64
template <>
inline constexpr double kPower2<double, 11>[] = {1,
                                                 0.693147180559945928,
                                                 0.240226506959063303,
                                                 0.0555041086656022352,
                                                 0.00961812909955092706,
                                                 0.00133335586295611045,
                                                 0.000154035123097818945,
                                                 0.00001525317505287072,
                                                 1.32083673195262697e-6,
                                                 1.02532122190936858e-7,
                                                 6.55953019315030042e-9,
                                                 6.26346462808862736e-10};  // 3.2e-18
template <>
inline constexpr float kPower2<float, 5>[] = {1,
                                              0.693151311807522955f,
                                              0.240164450136067553f,
                                              0.055799913145968067f,
                                              0.00901703028443674904f,
                                              0.00186713008190700818f};  // 8.2e-8
template <>
inline constexpr float kPower2<float, 4>[] = {1, 0.693044844646050116f, 0.24128020730071405f, 0.0522424685269844215f,
                                              0.0134266877340932664f};  // 2.9e-6
template <>
inline constexpr float kPower2<float, 3>[] = {1, 0.695116786445395685f, 0.22764499113539549f,
                                              0.0770670420720698556f};  // 8.6e-5
#else
template <>
inline constexpr double kPower2<double, 11>[] = {1,
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
template <>
inline constexpr float kPower2<float, 5>[] = {1,
                                              0.693146977598992038f,
                                              0.240222420853767095f,
                                              0.0555073374347008527f,
                                              0.00967151263995645515f,
                                              0.00132647271400720133f};  // 9.2e-8
template <>
inline constexpr float kPower2<float, 4>[] = {1, 0.693124193420718485f, 0.24024098611670646f, 0.05590642459141304f,
                                              0.00958285302904600233f};  // 2.8e-6
template <>
inline constexpr float kPower2<float, 3>[] = {1, 0.693282927111494055f, 0.242210959410183542f,
                                              0.055008931160812809f};  // 1.0e-4
#endif

// The degrees that leave less than a rounding error, of an accumulator or of an element.
template <typename A>
constexpr int kFullDegree = sizeof(A) == 8 ? 11 : 5;
template <typename T>
constexpr int kElementDegree = std::is_same_v<T, BFloat16>  ? 3
                               : std::is_same_v<T, Float16> ? 4
                                                            : kFullDegree<T>;

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

// NaN in `b` is kept, NaN in `a` is not: the order of the operands of x86's max. (GCC makes a comparison and a blend of
// the conditional expression; the forms with a mask avoid the uninitialized operand of the plain intrinsics.)
CE_INLINE Floats max(Floats a, Floats b) {
#if CE_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif CE_VECTOR_BYTES == 32
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
CE_INLINE Doubles max(Doubles a, Doubles b) {
#if CE_VECTOR_BYTES == 64
  return (Doubles)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif CE_VECTOR_BYTES == 32
  return (Doubles)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

CE_INLINE Floats min(Floats a, Floats b) {
#if CE_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif CE_VECTOR_BYTES == 32
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
CE_INLINE Doubles min(Doubles a, Doubles b) {
#if CE_VECTOR_BYTES == 64
  return (Doubles)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
#elif CE_VECTOR_BYTES == 32
  return (Doubles)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

CE_INLINE bool any_negative(Int32s v) {
#if CE_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)v) != 0;
#elif CE_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)v) != 0;
#else
  const auto halves = bit_cast<UInt64s>(v);
  return ((halves[0] | halves[1]) & 0x8000000080000000) != 0;
#endif
}
CE_INLINE bool any_negative(Int64s v) {
#if CE_VECTOR_BYTES == 64
  return _mm512_movepi64_mask((__m512i)v) != 0;
#elif CE_VECTOR_BYTES == 32
  return _mm256_movemask_pd((__m256d)v) != 0;
#else
  return (v[0] | v[1]) < 0;
#endif
}

template <typename A, int kBytes>
struct VecOf {
  typedef A type __attribute__((vector_size(kBytes)));
};

// Combines the lanes of a vector by halves.
template <typename A, int kBytes, typename Combine>
CE_INLINE A reduce(typename VecOf<A, kBytes>::type v, Combine combine) {
  if constexpr (kBytes == 2 * sizeof(A)) {
    return combine(v[0], v[1]);
  } else {
    struct Halves {
      typename VecOf<A, kBytes / 2>::type low, high;
    };
    const auto halves = bit_cast<Halves>(v);
    return reduce<A, kBytes / 2>(combine(halves.low, halves.high), combine);
  }
}

template <typename A>
CE_INLINE A reduce_sum(Vec<A> v) {
  return reduce<A, CE_VECTOR_BYTES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <typename A>
CE_INLINE A reduce_max(Vec<A> v) {
  return reduce<A, CE_VECTOR_BYTES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

#if CE_VECTOR_BYTES == 64
// x − floor(x), which is 0 for −inf.
CE_INLINE Floats fraction(Floats x) {
  return (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
CE_INLINE Doubles fraction(Doubles x) {
  return (Doubles)_mm512_maskz_reduce_pd(0xff, (__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// x · 2^floor(n)
CE_INLINE Floats scale_by_power2(Floats x, Floats n) {
  return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
}
CE_INLINE Doubles scale_by_power2(Doubles x, Doubles n) {
  return (Doubles)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
}
#endif

// Keeps a product from being fused with an addition.
template <typename V>
CE_INLINE V unfused(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// exp(−d) for distances d ≥ 0. The steps of several vectors alternate: one vector's steps depend on each other, and a
// processor looks ahead at two or three vectors only.
template <typename A, int kCount, int kDegree = kFullDegree<A>>
struct ExpMinus {
  Vec<A> power[kCount];     // 2^f
  Vec<A> exponent[kCount];  // with n: n + f itself, or 2^n

  CE_INLINE explicit ExpMinus(const Vec<A> (&d)[kCount]) {
    using S = Simd<A>;
    constexpr auto& kPolynomial = kPower2<A, kDegree>;
    Vec<A> f[kCount];
#if CE_VECTOR_BYTES == 64
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      exponent[i] = d[i] * -S::kLog2e;
    }
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      f[i] = fraction(exponent[i]);
      power[i] = f[i] * kPolynomial[kDegree] + kPolynomial[kDegree - 1];
    }
#else
    // Adding the magic number leaves n plus the exponent's bias in the low bits. What would be subnormal becomes 0.
    Vec<A> near[kCount], shifted[kCount];
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      near[i] = min(broadcast(S::kFarthest), d[i]);
    }
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      shifted[i] = near[i] * -S::kLog2e + S::kMagic;
    }
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      f[i] = near[i] * -S::kLog2e + (S::kMagic - shifted[i]);
      power[i] = f[i] * kPolynomial[kDegree] + kPolynomial[kDegree - 1];
      exponent[i] = bit_cast<Vec<A>>(bit_cast<typename S::Bits>(shifted[i]) << S::kMantissa);
    }
#endif
    CE_UNROLL for (int k = kDegree - 2; k >= 0; --k) {
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        power[i] = power[i] * f[i] + kPolynomial[k];
      }
    }
  }

#if CE_VECTOR_BYTES == 64
  CE_INLINE Vec<A> get(int i) const { return scale_by_power2(power[i], exponent[i]); }
#else
  // A sum of these is to be the same whether the product is needed besides, or could be fused with the addition.
  CE_INLINE Vec<A> get(int i) const { return unfused(power[i] * exponent[i]); }
#endif
};

template <typename A>
CE_INLINE Vec<A> exp_minus(Vec<A> d) {
  const Vec<A> ds[] = {d};
  return ExpMinus<A, 1>(ds).get(0);
}

// n / d from an estimate of 1 / d and what its product with n misses.
CE_INLINE Floats divide(Floats n, Floats d) {
#if CE_VECTOR_BYTES == 64
  const Floats reciprocal = (Floats)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
#elif CE_VECTOR_BYTES == 32
  const Floats reciprocal = (Floats)_mm256_rcp_ps((__m256)d);
#else
  return n / d;
#endif
#if CE_VECTOR_BYTES > 16
  const Floats quotient = n * reciprocal;
  return (n - quotient * d) * reciprocal + quotient;
#endif
}

// ln x of positive normal numbers: with m · 2^n = x and m in [√½, √2), n · ln 2 + ln m, of which the latter is
// 2 · artanh(s) with s = (m − 1) / (m + 1).
template <typename A>
CE_INLINE Vec<A> log(Vec<A> x) {
  using S = Simd<A>;
  using Bits = typename S::Bits;
  constexpr A kLn2 = A(0.693147180559945309);
  constexpr A kHalfRoot = A(0.707106781186547524);
  const Bits bits = bit_cast<Bits>(x) - bit_cast<Bits>(broadcast(kHalfRoot));
  const auto n = bit_cast<typename S::Mask>(bits) >> S::kMantissa;
  const Vec<A> m = bit_cast<Vec<A>>(bit_cast<Bits>(x) - (bit_cast<Bits>(n) << S::kMantissa));
  const Vec<A> s = (m - 1) / (m + 1), t = s * s;
  Vec<A> series = broadcast(A(2) / (2 * S::kArtanhTerms + 1));
  CE_UNROLL for (int k = S::kArtanhTerms - 1; k >= 0; --k) {
    series = series * t + A(2) / (2 * k + 1);
  }
  // In the low bits of the magic number, since there is no such conversion of 64 bits before AVX-512.
  const Vec<A> magic = broadcast(A(int64_t{3} << (S::kMantissa - 1)));
  const Vec<A> exponent = bit_cast<Vec<A>>(bit_cast<typename S::Mask>(magic) + n) - magic;
  return exponent * kLn2 + s * series;
}

// cap · tanh(scale · x) of vectors whose elements are near 0, most of them.
template <typename A>
class Softcap;

template <>
class Softcap<float> {
 public:
  Softcap(float scale, float cap) : scale_(scale), cap_(cap) {
    if (cap == 0) {
      return;
    }
    const float near = kTanhNear / scale;
    // Powers of other scales are out of range.
    limit_ = scale > 1e-3f && scale < 1e3f ? near * near : -1;
    float factor = cap * scale;
    for (int k = 0; k <= kDegree; ++k, factor *= scale * scale) {
      of_squares_[k] = factor * kTanhOverArgument[k];
    }
  }

  template <int kCount>
  CE_INLINE void apply(Floats (&x)[kCount]) const {
    constexpr int kTogether = kCount < 4 ? kCount : 4;  // more need more registers than there are
    CE_UNROLL for (int first = 0; first < kCount; first += kTogether) {
      apply_together<kTogether>(x + first);
    }
  }

 private:
  template <int kCount>
  CE_INLINE void apply_together(Floats* x) const {
    Floats squares[kCount], capped[kCount];
    Floats farthest = {};
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      squares[i] = x[i] * x[i];
      farthest = max(farthest, squares[i]);
      capped[i] = squares[i] * of_squares_[kDegree] + of_squares_[kDegree - 1];
    }
    CE_UNROLL for (int k = kDegree - 2; k >= 0; --k) {
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        capped[i] = capped[i] * squares[i] + of_squares_[k];
      }
    }
    // Equal logits stay equal, whatever others there are, and whatever they are used for.
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      capped[i] = unfused(x[i] * capped[i]);
    }
    if (__builtin_expect(any_negative(bit_cast<Int32s>(limit_ - farthest)), 0)) {
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        x[i] = squares[i] > limit_ ? cap_far(x[i]) : capped[i];
      }
    } else {
      CE_UNROLL for (int i = 0; i < kCount; ++i) {
        x[i] = capped[i];
      }
    }
  }

  __attribute__((noinline)) Floats cap_far(Floats x) const {
    const Floats u = max(broadcast(-kTanhLimit), min(broadcast(kTanhLimit), x * scale_));
    const auto tanh = tanh_ratio(u);
    return cap_ * divide(tanh.numerator, tanh.denominator);
  }

  static constexpr int kDegree = std::size(kTanhOverArgument) - 1;
  float scale_, cap_, limit_ = 0;
  float of_squares_[kDegree + 1] = {};
};

template <>
class Softcap<double> {
 public:
  Softcap(double scale, double cap) : scale_(scale), cap_(cap) {}

  template <int kCount>
  CE_INLINE void apply(Doubles (&x)[kCount]) const {
    CE_UNROLL for (int i = 0; i < kCount; ++i) {
      x[i] = capped(x[i]);
    }
  }

 private:
  __attribute__((noinline)) Doubles capped(Doubles x) const {
    const Doubles u = x * scale_, square = u * u;
    const Doubles e = exp_minus<double>(2 * (u < 0 ? -u : u));
    const Doubles t = (1 - e) / (1 + e);
    Doubles series = broadcast(kSeries[std::size(kSeries) - 1]);
    for (int k = int(std::size(kSeries)) - 2; k >= 0; --k) {
      series = series * square + kSeries[k];
    }
    return cap_ * (square < kSmall ? u * series : u < 0 ? -t : t);
  }

  // Of tanh(u) / u in powers of u², for what 1 − e would cancel.
  static constexpr double kSmall = 0.01;
  static constexpr double kSeries[] = {1,           -1.0 / 3,         2.0 / 15,          -17.0 / 315,
                                       62.0 / 2835, -1382.0 / 155925, 21844.0 / 6081075, -929569.0 / 638512875};
  double scale_, cap_;
};

// How elements of type T look in memory, and the conversions from and to a vector of their accumulators.

template <typename T>
struct BitsOf {
  using type = UInt16s;
};
template <>
struct BitsOf<float> {
  using type = Floats;
};
template <>
struct BitsOf<double> {
  using type = Doubles;
};
template <typename T>
using Bits = typename BitsOf<T>::type;

// 16-bit to 32-bit integers and back. (GCC makes two halves of __builtin_convertvector.)
CE_INLINE UInt32s widen(UInt16s v) {
#if CE_VECTOR_BYTES == 64
  return (UInt32s)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif CE_VECTOR_BYTES == 32
  return (UInt32s)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, UInt32s);
#endif
}
CE_INLINE UInt16s narrow(UInt32s v) {
#if CE_VECTOR_BYTES == 64
  return (UInt16s)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#elif CE_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (UInt16s)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, UInt16s);
#endif
}

template <typename T>
CE_INLINE Vec<Acc<T>> from_bits(Bits<T> bits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast<Floats>(widen(bits) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if CE_VECTOR_BYTES == 64
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif CE_VECTOR_BYTES == 32
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
    const UInt32s wide = widen(bits);
    // Scaling by 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included.
    const UInt32s finite = bit_cast<UInt32s>(bit_cast<Floats>((wide & 0x7fff) << 13) * 0x1p112f);
    const UInt32s special = (UInt32s)((wide & 0x7c00) == 0x7c00) & 0x7f800000;
    return bit_cast<Floats>(finite | special | (wide & 0x8000) << 16);
#endif
  } else {
    return bits;
  }
}

// With the bfloat16 in the upper halves. The NaNs that arithmetic makes have the highest bit of the mantissa set.
CE_INLINE UInt32s round_to_bfloat16(Floats v) {
  const UInt32s bits = bit_cast<UInt32s>(v);
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits;
}

template <typename T>
CE_INLINE Bits<T> to_bits(Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return narrow(round_to_bfloat16(v) >> 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if CE_VECTOR_BYTES == 64
    return (UInt16s)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif CE_VECTOR_BYTES == 32
    return (UInt16s)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const UInt32s wide = bit_cast<UInt32s>(v);
    const UInt32s magnitude = wide & 0x7fffffff;
    // Normal: rebias the exponent and round to nearest even. Subnormal: adding ½ lets the addition do the rounding.
    const UInt32s normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
    const UInt32s subnormal = bit_cast<UInt32s>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
    const UInt32s special = magnitude > 0x7f800000 ? UInt32s{} + 0x7e00 : UInt32s{} + 0x7c00;
    const UInt32s value = magnitude >= 0x477ff000 ? special : (magnitude < 0x38800000 ? subnormal : normal);
    return narrow(value | (wide >> 16 & 0x8000));
#endif
  } else {
    return v;
  }
}

// Loads and stores of kLanes adjacent elements.

template <typename T>
CE_INLINE Vec<Acc<T>> load(const T* p) {
  Bits<T> bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return from_bits<T>(bits);
}

// As many of an accumulator's numbers as a vector has doubles.
CE_INLINE Doubles load_doubles(const float* p) {
  typename VecOf<float, CE_VECTOR_BYTES / 2>::type half;
  __builtin_memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Doubles);
}
CE_INLINE Doubles load_doubles(const double* p) {
  return load(p);
}
CE_INLINE void store_doubles(float* p, Doubles v) {
  const auto half = __builtin_convertvector(v, typename VecOf<float, CE_VECTOR_BYTES / 2>::type);
  __builtin_memcpy(p, &half, sizeof(half));
}
CE_INLINE void store_doubles(double* p, Doubles v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

CE_INLINE Int64s load_mask(const bool* p) {
  typename VecOf<int8_t, CE_VECTOR_BYTES / 8>::type bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Int64s) != 0;
}

template <typename T>
CE_INLINE void store(T* p, Vec<Acc<T>> v) {
  const Bits<T> bits = to_bits<T>(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// Vectors that are best loaded and stored together: a run of kRun<T>. The lanes of two vectors of bfloat16 are the
// upper and the lower halves of 32-bit words, so the run's elements are not in their order.
template <typename T>
constexpr int kRun = std::is_same_v<T, BFloat16> ? 2 : 1;

template <typename T>
CE_INLINE void load_run(const T* p, Vec<Acc<T>>* v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    UInt32s words;
    __builtin_memcpy(&words, p, sizeof(words));
    v[0] = bit_cast<Floats>(words << 16);
    v[1] = bit_cast<Floats>(words & 0xffff0000);
  } else {
    v[0] = load(p);
  }
}

template <typename V>
CE_INLINE void store_bits(void* p, V bits, [[maybe_unused]] bool streams) {
#if CE_VECTOR_BYTES == 64
  if (streams) {
    if constexpr (sizeof(V) == 64) {
      return _mm512_stream_si512((__m512i*)p, bit_cast<__m512i>(bits));
    } else {
      return _mm256_stream_si256((__m256i*)p, bit_cast<__m256i>(bits));
    }
  }
#elif CE_VECTOR_BYTES == 32
  if (streams) {
    if constexpr (sizeof(V) == 32) {
      return _mm256_stream_si256((__m256i*)p, bit_cast<__m256i>(bits));
    } else {
      return _mm_stream_si128((__m128i*)p, bit_cast<__m128i>(bits));
    }
  }
#endif
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// `streams`: past the caches, to where a run is aligned.
template <typename T>
CE_INLINE void store_run(T* p, const Vec<Acc<T>>* v, bool streams) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    store_bits(p, round_to_bfloat16(v[0]) >> 16 | (round_to_bfloat16(v[1]) & 0xffff0000), streams);
  } else {
    store_bits(p, to_bits<T>(v[0]), streams);
  }
}

// Orders streaming stores before all that follows, as other stores are.
CE_INLINE void finish_streaming() {
#if CE_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

// One vector whose lane i is the element at p[i · stride], for i < count; the other lanes are 0. What is not a load or
// store of adjacent elements is kept out of line: inlined everywhere it would be most of the code.
template <typename T>
__attribute__((noinline)) Vec<Acc<T>> load_some(const T* p, int64_t stride, int count) {
#if CE_VECTOR_BYTES == 64
  if (stride == 1) {
    const unsigned lanes = (1u << count) - 1;
    if constexpr (sizeof(T) == 8) {
      return (Doubles)_mm512_maskz_loadu_pd(lanes, p);
    } else if constexpr (sizeof(T) == 4) {
      return from_bits<T>((Bits<T>)_mm512_maskz_loadu_ps(lanes, p));
    } else {
      return from_bits<T>((Bits<T>)_mm256_maskz_loadu_epi16(lanes, p));
    }
  }
#endif
  T lane[kLanes<Acc<T>>] = {};
  for (int i = 0; i < count; ++i) {
    lane[i] = p[i * stride];
  }
  return load(lane);
}

template <typename T>
CE_INLINE Vec<Acc<T>> load(const T* p, int64_t stride, int count) {
  return __builtin_expect(stride == 1 && count == kLanes<Acc<T>>, 1) ? load(p) : load_some(p, stride, count);
}

template <typename T>
__attribute__((noinline)) void store_some(T* p, int64_t stride, int count, Vec<Acc<T>> v) {
#if CE_VECTOR_BYTES == 64
  if (stride == 1) {
    const unsigned lanes = (1u << count) - 1;
    const Bits<T> bits = to_bits<T>(v);
    if constexpr (sizeof(T) == 8) {
      _mm512_mask_storeu_pd(p, lanes, (__m512d)bits);
    } else if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, lanes, (__m512)bits);
    } else {
      _mm256_mask_storeu_epi16(p, lanes, (__m256i)bits);
    }
    return;
  }
#endif
  T lane[kLanes<Acc<T>>];
  store(lane, v);
  for (int i = 0; i < count; ++i) {
    p[i * stride] = lane[i];
  }
}

template <typename T>
CE_INLINE void store(T* p, int64_t stride, int count, Vec<Acc<T>> v) {
  if (__builtin_expect(stride == 1 && count == kLanes<Acc<T>>, 1)) {
    store(p, v);
  } else {
    store_some(p, stride, count, v);
  }
}

// Lane i of `a`, lane i of `b`, lane i + 1 of `a` and so on, from lane kFirst on.
template <typename A, int kFirst, int... kLane>
CE_INLINE Vec<A> interleave(Vec<A> a, Vec<A> b, std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes<A>)...);
#else
  return __builtin_shuffle(a, b, typename Simd<A>::Mask{(kFirst + kLane / 2 + kLane % 2 * kLanes<A>)...});
#endif
}

// Each round moves the highest bit of the vector's number to the lowest of the lane's, and the highest bit of the
// lane's number to the lowest of the vector's; in the end they have changed places.
template <typename A>
CE_INLINE void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int kHalf = kLanes<A> / 2;
  constexpr std::make_integer_sequence<int, kLanes<A>> kAll;
  CE_UNROLL for (int round = 1; round < kLanes<A>; round *= 2) {
    Vec<A> turned[kLanes<A>];
    CE_UNROLL for (int i = 0; i < kHalf; ++i) {
      turned[2 * i] = interleave<A, 0>(v[i], v[i + kHalf], kAll);
      turned[2 * i + 1] = interleave<A, kHalf>(v[i], v[i + kHalf], kAll);
    }
    CE_UNROLL for (int i = 0; i < kLanes<A>; ++i) {
      v[i] = turned[i];
    }
  }
}

// Up to kLanes rows of `count` adjacent elements to `count` vectors whose lanes run across the rows, and back.
// `columns` has room for whole blocks of kLanes; lanes without a row are 0. The last block is a whole one that overlaps
// the one before, if there is one. The next rows are prefetched: the processor does not foresee them.
template <typename T>
__attribute__((noinline)) void transpose_in(const T* p, int64_t row_stride, int rows, int64_t count,
                                            Vec<Acc<T>>* columns) {
  using A = Acc<T>;
  const int lanes = count < kLanes<A> ? static_cast<int>(count) : kLanes<A>;
  for (int64_t begin = 0; begin < count; begin += kLanes<A>) {
    const int64_t c = begin + lanes > count ? count - lanes : begin;
    Vec<A> v[kLanes<A>];
    CE_UNROLL for (int row = 0; row < kLanes<A>; ++row) {
      v[row] = row < rows ? load(p + row * row_stride + c, 1, lanes) : Vec<A>{};
      __builtin_prefetch(p + c + row_stride * (row + kLanes<A>));
    }
    transpose<A>(v);
    CE_UNROLL for (int i = 0; i < kLanes<A>; ++i) {
      columns[c + i] = v[i];
    }
  }
}

template <typename T>
__attribute__((noinline)) void transpose_out(const Vec<Acc<T>>* columns, T* p, int64_t row_stride, int rows,
                                             int64_t count) {
  using A = Acc<T>;
  const int lanes = count < kLanes<A> ? static_cast<int>(count) : kLanes<A>;
  for (int64_t begin = 0; begin < count; begin += kLanes<A>) {
    const int64_t c = begin + lanes > count ? count - lanes : begin;
    Vec<A> v[kLanes<A>];
    CE_UNROLL for (int i = 0; i < kLanes<A>; ++i) {
      v[i] = columns[c + i];
    }
    transpose<A>(v);
    for (int row = 0; row < rows; ++row) {
      store(p + row * row_stride + c, 1, lanes, v[row]);
      __builtin_prefetch(p + c + row_stride * (row + kLanes<A>), 1);
    }
  }
}

}  // namespace ce::cpu::CE_ISA
