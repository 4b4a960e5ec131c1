// How the blocks of every quantised type are taken apart, written against `Bytes`. `prima_numpy/unpack.py` is the same
// in numpy; layouts: `block_*` in ggml-common.h. Included inside a variant's namespace.
//
// A type says of a block: d and dmin; the scales and minima of its kGroups groups; and its codes, 32 at a time.
//   weight = d * scale * code - dmin * minimum
// What `codes` gives are int8 of magnitudes up to kLargest where kIsSigned, else bytes up to kLargest that stand for
// code + kOffset. kIsSlow: taking a block apart costs more than multiplying it, so that doing it once for all activation
// rows pays early.

#if defined(__clang__)
#define PRIMA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PRIMA_UNROLL _Pragma("GCC unroll 8")
#else
#define PRIMA_UNROLL
#endif

// For parts of a loop's body that must keep their values in registers.
#if defined(__GNUC__) || defined(__clang__)
#define PRIMA_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define PRIMA_INLINE __forceinline
#else
#define PRIMA_INLINE inline
#endif

// For loops that need all registers: inlined, they would be shared with what is around.
#if defined(_MSC_VER)
#define PRIMA_NOINLINE __declspec(noinline)
#else
#define PRIMA_NOINLINE __attribute__((noinline))
#endif

inline uint32_t load_u32(const uint8_t* p) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return v;
}
inline uint64_t load_u64(const uint8_t* p) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    return v;
}

// ---------------------------------------------------------------- blocks of 32: one group

struct SmallBlock {
    using X = Block8;
    static constexpr int kWeights = kQ8Block, kOffset = 0, kLargest = 15;
    // d, and the minimum behind it, are halves at the beginning of the block.
    static constexpr bool kHasHalves = true;
    static constexpr bool kIsSigned = false, kHasMinima = false, kIsSlow = false;
    static const X* activations(const Activations& a) { return a.q8; }
    static float d(const uint8_t* block) { return half_at(block); }
    static float dmin(const uint8_t*) { return 0.0f; }
};

// ggml adds a minimum here; ours is taken off.
struct SmallBlockWithMinimum : SmallBlock {
    static constexpr bool kHasMinima = true;
    static float dmin(const uint8_t* block) { return -half_at(block + 2); }
};

// Four bits and a fifth from elsewhere.
inline Bytes five_bits(const uint8_t* fifth, const uint8_t* nibbles) {
    return Bytes::nibbles(nibbles) | Bytes::of_bits(load_u32(fifth)).field(0, 16);
}

struct Q4_0 : SmallBlock {
    static constexpr int kBytes = 18, kOffset = 8;
    static Bytes codes(const uint8_t* block, int) { return Bytes::nibbles(block + 2); }
};

struct Q4_1 : SmallBlockWithMinimum {
    static constexpr int kBytes = 20;
    static Bytes codes(const uint8_t* block, int) { return Bytes::nibbles(block + 4); }
};

struct Q5_0 : SmallBlock {
    static constexpr int kBytes = 22, kOffset = 16, kLargest = 31;
    static Bytes codes(const uint8_t* block, int) { return five_bits(block + 2, block + 6); }
};

struct Q5_1 : SmallBlockWithMinimum {
    static constexpr int kBytes = 24, kLargest = 31;
    static Bytes codes(const uint8_t* block, int) { return five_bits(block + 4, block + 8); }
};

struct Q8_0 : SmallBlock {
    static constexpr int kBytes = 34, kLargest = 128;
    static constexpr bool kIsSigned = true;
    static Bytes codes(const uint8_t* block, int) { return Bytes::load(block + 2); }
};

struct IQ4_NL : SmallBlock {
    static constexpr int kBytes = 18, kLargest = 127;
    static constexpr bool kIsSigned = true;
    static Bytes codes(const uint8_t* block, int) { return Bytes::nibbles(block + 2).look_up(kIq4Nl); }
};

struct MXFP4 : SmallBlock {
    static constexpr int kBytes = 17, kLargest = 12;
    static constexpr bool kIsSigned = true, kHasHalves = false;
    static float d(const uint8_t* block) {  // e8m0 of twice the unit; the lowest two units are subnormal
        const uint32_t exponent = block[0];
        return float_of_bits(exponent < 2 ? 0x200000u << exponent : (exponent - 1) << 23);
    }
    static Bytes codes(const uint8_t* block, int) { return Bytes::nibbles(block + 1).look_up(kMxfp4); }
};

// Eight bytes as words, plus `offset`.
inline void widen(uint64_t packed, int offset, int16_t* words) {
#ifdef __AVX2__
    const __m128i wide = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)packed));
    _mm_storeu_si128((__m128i*)words, _mm_add_epi16(wide, _mm_set1_epi16(short(offset))));
#else
    uint8_t bytes[8];
    std::memcpy(bytes, &packed, 8);
    for (int j = 0; j < 8; ++j) words[j] = int16_t(bytes[j] + offset);
#endif
}

// ---------------------------------------------------------------- K types: 256 in groups of 16 or 32

struct BigBlock {
    using X = BlockK;
    static constexpr int kWeights = kKBlock, kGroups = 8, kOffset = 0, kLargest = 15;
    static constexpr int kHalf = -1;  // where d is a half as it lies in the block, and dmin behind it: at this byte
    static constexpr bool kIsSigned = false, kHasMinima = false, kIsSlow = false;
    static const X* activations(const Activations& a) { return a.k; }
    static float d(const uint8_t* block) { return half_at(block); }
    static float dmin(const uint8_t*) { return 0.0f; }
};

// Eight 6-bit scales and eight minima from the 12 bytes of a Q4_K block, a byte each.
inline void unpack_scales(const uint8_t* packed, uint64_t& scales, uint64_t& minima) {
    const uint32_t a = load_u32(packed), b = load_u32(packed + 4), c = load_u32(packed + 8);
    const uint32_t high_scales = (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u);
    const uint32_t high_minima = (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u);
    scales = uint64_t(high_scales) << 32 | (a & 0x3f3f3f3fu);
    minima = uint64_t(high_minima) << 32 | (b & 0x3f3f3f3fu);
}

struct Q2_K : BigBlock {
    static constexpr int kBytes = 84, kGroups = 16, kLargest = 3, kHalf = 80;
    static constexpr bool kHasMinima = true;
    static float d(const uint8_t* block) { return half_at(block + 80); }
    static float dmin(const uint8_t* block) { return half_at(block + 82); }
    static void scales(const uint8_t* block, int16_t* scales, int16_t* minima) {
        for (int j = 0; j < 16; ++j) scales[j] = block[j] & 15, minima[j] = block[j] >> 4;
    }
    static Bytes codes(const uint8_t* block, int i) {
        return Bytes::load(block + 16 + 32 * (i / 4)).field(2 * (i % 4), 3);
    }
};

struct Q3_K : BigBlock {
    static constexpr int kBytes = 110, kGroups = 16, kOffset = 4, kLargest = 7, kHalf = 108;
    static float d(const uint8_t* block) { return half_at(block + 108); }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        const uint64_t nibbles = 0x0f0f0f0f0f0f0f0full, low = load_u64(block + 96);
        const auto pairs = [block](int shift) {  // two bits of eight scales
            const uint32_t high = load_u32(block + 104), mask = 0x03030303u;
            return uint64_t(high >> shift & mask) << 4 | uint64_t(high >> (shift + 2) & mask) << 36;
        };
        widen((low & nibbles) | pairs(0), -32, scales);
        widen((low >> 4 & nibbles) | pairs(4), -32, scales + 8);
    }
    static Bytes codes(const uint8_t* block, int i) {
        return Bytes::load(block + 32 + 32 * (i / 4)).field(2 * (i % 4), 3) | Bytes::load(block).field(i - 2, 4);
    }
};

struct Q4_K : BigBlock {
    static constexpr int kBytes = 144, kHalf = 0;
    static constexpr bool kHasMinima = true;
    static float dmin(const uint8_t* block) { return half_at(block + 2); }
    static void scales(const uint8_t* block, int16_t* scales, int16_t* minima) {
        uint64_t s, m;
        unpack_scales(block + 4, s, m);
        widen(s, 0, scales);
        widen(m, 0, minima);
    }
    static Bytes codes(const uint8_t* block, int i) {
        return Bytes::load(block + 16 + 32 * (i / 2)).field(4 * (i % 2), 15);
    }
};

struct Q5_K : Q4_K {
    static constexpr int kBytes = 176, kLargest = 31;
    static Bytes codes(const uint8_t* block, int i) {
        const Bytes low = Bytes::load(block + 48 + 32 * (i / 2)).field(4 * (i % 2), 15);
        return low | Bytes::load(block + 16).field(i - 4, 16);
    }
};

struct Q6_K : BigBlock {
    static constexpr int kBytes = 210, kGroups = 16, kOffset = 32, kLargest = 63, kHalf = 208;
    static float d(const uint8_t* block) { return half_at(block + 208); }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        for (int j = 0; j < 16; ++j) scales[j] = int8_t(block[192 + j]);
    }
    static Bytes codes(const uint8_t* block, int i) {
        const int half = i / 4, run = i % 4;
        const Bytes low = Bytes::load(block + 64 * half + 32 * (run % 2)).field(4 * (run / 2), 15);
        return low | Bytes::load(block + 128 + 32 * half).field(2 * run - 4, 48);
    }
};

// ---------------------------------------------------------------- IQ types: 256, codes from tables

struct TableBlock : BigBlock {
    static constexpr bool kIsSigned = true, kIsSlow = true;
};

// 2 s + 1 of the low and the high nibble of each byte in turn.
template <int n_bytes>
inline void odd_from_nibbles(const uint8_t* packed, int16_t* scales) {
    uint32_t pairs[n_bytes];
    for (int j = 0; j < n_bytes; ++j) pairs[j] = (packed[j] & 15u) << 1 | (packed[j] & 240u) << 13 | 0x00010001u;
    std::memcpy(scales, pairs, 4 * n_bytes);
}

// Entries of 8 or 4 bytes; `index(k)` is the number of the k-th.
template <class Index>
inline Bytes four_entries(const int8_t* grid, const Index& index) {
    uint64_t entries[4];
    for (int k = 0; k < 4; ++k) std::memcpy(entries + k, grid + 8 * index(k), 8);
    return Bytes::of_words(entries[0], entries[1], entries[2], entries[3]);
}
template <class Index>
inline Bytes eight_entries(const int8_t* grid, const Index& index) {
    const auto pair = [&](int k) {
        uint32_t entries[2];
        std::memcpy(entries, grid + 4 * index(k), 4);
        std::memcpy(entries + 1, grid + 4 * index(k + 1), 4);
        return uint64_t(entries[0]) | uint64_t(entries[1]) << 32;
    };
    return Bytes::of_words(pair(0), pair(2), pair(4), pair(6));
}

// 32 signs from four indices of 7 bits.
inline uint32_t four_signs(uint32_t packed) {
    return uint32_t(kSigns[packed & 127]) | uint32_t(kSigns[packed >> 7 & 127]) << 8 |
           uint32_t(kSigns[packed >> 14 & 127]) << 16 | uint32_t(kSigns[packed >> 21 & 127]) << 24;
}

struct IQ4_XS : TableBlock {
    static constexpr int kBytes = 136, kHalf = 0, kLargest = 127;
    static constexpr bool kIsSlow = false;
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        const int high = load_u16(block + 2);
        for (int j = 0; j < 8; ++j) {
            scales[j] = int16_t(((block[4 + j / 2] >> 4 * (j % 2) & 15) | (high >> 2 * j & 3) << 4) - 32);
        }
    }
    static Bytes codes(const uint8_t* block, int i) { return Bytes::nibbles(block + 8 + 16 * i).look_up(kIq4Nl); }
};

struct IQ2_XXS : TableBlock {  // groups: four indices, then 4 * 7 bits of signs and 4 of scale
    static constexpr int kBytes = 66, kLargest = 43;
    static float d(const uint8_t* block) { return half_at(block) * 0.125f; }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        for (int j = 0; j < 8; ++j) scales[j] = int16_t(2 * (block[9 + 8 * j] >> 4) + 1);
    }
    static Bytes codes(const uint8_t* block, int i) {
        const uint8_t* group = block + 2 + 8 * i;
        const Bytes entries = four_entries(kIq2XxsGrid, [&](int k) { return group[k]; });
        return negate_where(Bytes::of_bits(four_signs(load_u32(group + 4))), entries);
    }
};

struct IQ2_XS : TableBlock {  // 9 bits of index, 7 of signs
    static constexpr int kBytes = 74, kGroups = 16, kLargest = 43;
    static float d(const uint8_t* block) { return half_at(block) * 0.125f; }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) { odd_from_nibbles<8>(block + 66, scales); }
    static Bytes codes(const uint8_t* block, int i) {
        uint16_t packed[4];
        std::memcpy(packed, block + 2 + 8 * i, 8);
        uint32_t signs = 0;
        for (int k = 0; k < 4; ++k) signs |= uint32_t(kSigns[packed[k] >> 9]) << 8 * k;
        const Bytes entries = four_entries(kIq2XsGrid, [&](int k) { return packed[k] & 511; });
        return negate_where(Bytes::of_bits(signs), entries);
    }
};

struct IQ2_S : TableBlock {
    static constexpr int kBytes = 82, kGroups = 16, kLargest = 43;
    static float d(const uint8_t* block) { return half_at(block) * 0.125f; }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) { odd_from_nibbles<8>(block + 74, scales); }
    static Bytes codes(const uint8_t* block, int i) {
        const uint8_t* low = block + 2 + 4 * i;
        const int high = block[66 + i];
        const Bytes entries = four_entries(kIq2SGrid, [&](int k) { return low[k] | (high >> 2 * k & 3) << 8; });
        return negate_where(Bytes::of_bits(load_u32(block + 34 + 4 * i)), entries);
    }
};

struct IQ3_XXS : TableBlock {
    static constexpr int kBytes = 98, kLargest = 62;
    static float d(const uint8_t* block) { return half_at(block) * 0.25f; }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        for (int j = 0; j < 8; ++j) scales[j] = int16_t(2 * (block[69 + 4 * j] >> 4) + 1);
    }
    static Bytes codes(const uint8_t* block, int i) {
        const uint8_t* index = block + 2 + 8 * i;
        const Bytes entries = eight_entries(kIq3XxsGrid, [&](int k) { return index[k]; });
        return negate_where(Bytes::of_bits(four_signs(load_u32(block + 66 + 4 * i))), entries);
    }
};

struct IQ3_S : TableBlock {
    static constexpr int kBytes = 110, kLargest = 15;
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) { odd_from_nibbles<4>(block + 106, scales); }
    static Bytes codes(const uint8_t* block, int i) {
        const uint8_t* low = block + 2 + 8 * i;
        const int high = block[66 + i];
        const Bytes entries = eight_entries(kIq3SGrid, [&](int k) { return low[k] | (high >> k & 1) << 8; });
        return negate_where(Bytes::of_bits(load_u32(block + 74 + 4 * i)), entries);
    }
};

struct IQ1_S : TableBlock {  // 4 * 3 bits of index, 3 of scale, the sign of the offset
    static constexpr int kBytes = 50, kLargest = 9;
    static float d(const uint8_t* block) { return half_at(block) * 0.125f; }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        for (int j = 0; j < 8; ++j) scales[j] = int16_t(2 * (block[35 + 2 * j] >> 4 & 7) + 1);
    }
    static Bytes codes(const uint8_t* block, int i) {
        const uint8_t* low = block + 2 + 4 * i;
        const int high = load_u16(block + 34 + 2 * i);
        const Bytes entries = four_entries(kIq1Grid, [&](int k) { return low[k] | (high >> 3 * k & 7) << 8; });
        return entries + Bytes::set(high >> 15 ? -1 : 1);
    }
};

struct IQ1_M : TableBlock {  // nibbles: 3 bits of index, the sign of the offset; words: 4 * 3 bits of scales, 4 of d
    static constexpr int kBytes = 56, kGroups = 16, kLargest = 9;
    static float d(const uint8_t* block) {
        const uint8_t nibbles[4] = {block[49], block[51], block[53], block[55]};
        const uint8_t half[2] = {uint8_t(nibbles[0] >> 4 | (nibbles[1] & 240)),
                                 uint8_t(nibbles[2] >> 4 | (nibbles[3] & 240))};
        return half_at(half) * 0.125f;
    }
    static void scales(const uint8_t* block, int16_t* scales, int16_t*) {
        const uint64_t packed = load_u64(block + 48);
        for (int j = 0; j < 4; ++j) {
            const uint64_t four = packed >> 16 * j & 4095;  // three bits each, to words
            const uint64_t words = (four & 7) | (four & 56) << 13 | (four & 448) << 26 | (four & 3584) << 39;
            const uint64_t odd = words << 1 | 0x0001000100010001ull;
            std::memcpy(scales + 4 * j, &odd, 8);
        }
    }
    static Bytes codes(const uint8_t* block, int i) {
        const uint8_t* low = block + 4 * i;
        const uint32_t high = load_u16(block + 32 + 2 * i);
        const Bytes entries = four_entries(kIq1Grid, [&](int k) { return low[k] | int(high >> 4 * k & 7) << 8; });
        uint32_t minus = 0;
        for (int k = 0; k < 4; ++k) minus |= (high >> (4 * k + 3) & 1) * 255u << 8 * k;
        return entries + (Bytes::of_bits(minus) | Bytes::set(1));
    }
};

// ---------------------------------------------------------------- the table of matrices

// Every type's kernels; `Quantised<B>::kernels()` gives those of a quantised one.
template <template <class> class Quantised>
constexpr Matrices all_matrices() {
    Matrices m{};
    const auto set = [&m](Type type, MatrixKernels kernels) { m.of[int(type)] = kernels; };
    set(Type::F32, float_kernels<F32Type>());
    set(Type::F16, float_kernels<F16Type>());
    set(Type::BF16, float_kernels<BF16Type>());
    set(Type::Q4_0, Quantised<Q4_0>::kernels());
    set(Type::Q4_1, Quantised<Q4_1>::kernels());
    set(Type::Q5_0, Quantised<Q5_0>::kernels());
    set(Type::Q5_1, Quantised<Q5_1>::kernels());
    set(Type::Q8_0, Quantised<Q8_0>::kernels());
    set(Type::Q2_K, Quantised<Q2_K>::kernels());
    set(Type::Q3_K, Quantised<Q3_K>::kernels());
    set(Type::Q4_K, Quantised<Q4_K>::kernels());
    set(Type::Q5_K, Quantised<Q5_K>::kernels());
    set(Type::Q6_K, Quantised<Q6_K>::kernels());
    set(Type::IQ1_S, Quantised<IQ1_S>::kernels());
    set(Type::IQ1_M, Quantised<IQ1_M>::kernels());
    set(Type::IQ2_XXS, Quantised<IQ2_XXS>::kernels());
    set(Type::IQ2_XS, Quantised<IQ2_XS>::kernels());
    set(Type::IQ2_S, Quantised<IQ2_S>::kernels());
    set(Type::IQ3_XXS, Quantised<IQ3_XXS>::kernels());
    set(Type::IQ3_S, Quantised<IQ3_S>::kernels());
    set(Type::IQ4_NL, Quantised<IQ4_NL>::kernels());
    set(Type::IQ4_XS, Quantised<IQ4_XS>::kernels());
    set(Type::MXFP4, Quantised<MXFP4>::kernels());
    return m;
}
