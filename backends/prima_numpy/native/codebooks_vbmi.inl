// Products of four weight rows with 1 to 4 activation rows, for the types whose codes come from codebooks. Included
// inside the namespace of a variant with AVX-512 VNNI, VBMI and GFNI.
//
// Looking up is what these types cost, so all is arranged around it. A codebook is cut into planes, whose bytes hold
// four levels of an entry (2 bits each) or two (3 bits). 256 bytes of a plane are four registers, and one `vpermb`
// looks up 64 indices in one of them. What comes out are 64 bytes with the first levels of 64 entries, so that the j-th
// levels of all entries end up in one register: activations are put into the same order (BlockK::turned), once per
// product. A level and its sign are six bits or less, which one more `vpermb` turns into kCodeOffset + code.
//
// Types with eight levels per entry have 32 indices in a block: two weight rows share a register. Those with four have
// 64. IQ1 has 2048 entries: 16 registers of each plane, where gathering is faster.
//
// What limits it is port 5, which does all permutations, one per cycle: 48 of them for four blocks of IQ2_XXS, of about
// 110 instructions on two ports, come to 12 to 14 cycles a block; 19 are measured. Looking up the next blocks while
// these are multiplied gained 4 to 8 % for IQ2_XS and IQ2_S, and lost as much for IQ3 and more for IQ1.

constexpr int64_t kPrefetchBytes = 1024;
constexpr int kCodeOffset = 64;  // what is added to a code, so that it is unsigned
alignas(64) constexpr uint8_t kCounting[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                               32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                               48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

inline __m128i load128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i twice256(const void* p) { return _mm512_broadcast_i64x4(load256(p)); }
// 32 bytes of one row and of another.
inline __m512i join(const void* first, const void* second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load256(first)), load256(second), 1);
}
// Eight bytes eight times, and eight of each of two four times.
inline __m512i repeat(const void* p) { return _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p)); }
inline __m512i repeat(const void* first, const void* second) {
    return _mm512_mask_broadcastq_epi64(repeat(first), 0xf0, _mm_loadl_epi64((const __m128i*)second));
}
// mask ? a : b, bit by bit.
inline __m512i select_bits(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(char(mask)), a, b, 0xca);
}
// (a & mask) | bits
inline __m512i keep_and_set(__m512i a, int mask, int bits) {
    return _mm512_ternarylogic_epi32(a, _mm512_set1_epi32(mask), _mm512_set1_epi32(bits), 0xea);
}

// ---------------------------------------------------------------- lookups

// Which of the four registers of 256 bytes each index is in.
struct Quarter {
    __mmask64 second, third, fourth;

    explicit Quarter(__m512i index) {
        const __mmask64 bit6 = _mm512_movepi8_mask(_mm512_slli_epi16(index, 1));
        third = _mm512_movepi8_mask(index);
        second = bit6;
        fourth = bit6 & third;
    }
    __m512i look_up(const uint8_t* plane, __m512i index) const {
        __m512i found = _mm512_permutexvar_epi8(index, load512(plane));
        found = _mm512_mask_permutexvar_epi8(found, second, index, load512(plane + 64));
        found = _mm512_mask_permutexvar_epi8(found, third, index, load512(plane + 128));
        return _mm512_mask_permutexvar_epi8(found, fourth, index, load512(plane + 192));
    }
    // Of 512 bytes; bit8: whose index is 256 or more.
    __m512i look_up(const uint8_t* plane, __m512i index, __mmask64 bit8) const {
        return _mm512_mask_blend_epi8(bit8, look_up(plane, index), look_up(plane + 256, index));
    }
};

// ---------------------------------------------------------------- codes

// Levels and signs to kCodeOffset + code.
struct alignas(64) CodeTable {
    uint8_t of[64];

    // Where in an index the level's number and the sign are.
    template <int n>
    constexpr CodeTable(const int8_t (&levels)[n], int level_at, int sign_at) : of() {
        for (int i = 0; i < 64; ++i) {
            const int number = i >> level_at & (n <= 4 ? 3 : 7), level = number < n ? levels[number] : 0;
            of[i] = uint8_t(kCodeOffset + (i >> sign_at & 1 ? -level : level));
        }
    }
    __m512i look_up(__m512i index) const { return _mm512_permutexvar_epi8(index, load512(of)); }
};

// Which bits of a byte make up the sign of each of eight weights.
struct SignBits {
    uint8_t of[8];
};
// A row of a matrix for `gf2p8affineqb`: the sign of a weight as that bit of the result.
constexpr uint64_t sign_at(int bit, const SignBits& signs, int weight) {
    return uint64_t(signs.of[weight]) << 8 * (7 - bit);
}
constexpr long long kSevens = 0x352e2720150e0700;  // where in 64 bits two times four runs of 7 bits are
constexpr SignBits kEightSigns = {{1, 2, 4, 8, 16, 32, 64, 128}};
constexpr SignBits kSevenSigns = {{1, 2, 4, 8, 16, 32, 64, 127}};  // the eighth makes their number even
constexpr SignBits kHighSevenSigns = {{2, 4, 8, 16, 32, 64, 128, 254}};

// 64 entries of four levels of 2 bits, and the eight signs of each, of which these are `first` and the next three:
// [j] the j-th codes.
inline void codes_of_four(__m512i levels, __m512i sign_bytes, const SignBits& of, int first, __m512i codes[4]) {
    static constexpr CodeTable tables[4] = {
        {kIq2Levels, 0, 4}, {kIq2Levels, 2, 5}, {kIq2Levels, 2, 0}, {kIq2Levels, 4, 1}};
    const uint64_t matrix =
        sign_at(4, of, first) | sign_at(5, of, first + 1) | sign_at(0, of, first + 2) | sign_at(1, of, first + 3);
    const __m512i signs = _mm512_gf2p8affine_epi64_epi8(sign_bytes, _mm512_set1_epi64((long long)matrix), 0);
    const __m512i front = select_bits(0x0f, levels, signs);
    const __m512i back = select_bits(0x3c, _mm512_srli_epi16(levels, 2), signs);
    codes[0] = tables[0].look_up(front);
    codes[1] = tables[1].look_up(front);
    codes[2] = tables[2].look_up(back);
    codes[3] = tables[3].look_up(back);
}

// 64 entries of two levels of 3 bits, and the eight signs of each with its neighbour: these are `first` and the next of
// the lower half, and those four further of the upper.
inline void codes_of_two(const CodeTable tables[2], __m512i levels, __m512i sign_bytes, const SignBits& of, int first,
                         __m512i codes[2]) {
    const auto matrix = [&](int weight) { return (long long)(sign_at(3, of, weight) | sign_at(0, of, weight + 1)); };
    const __m512i matrices = _mm512_mask_set1_epi64(_mm512_set1_epi64(matrix(first)), 0xf0, matrix(first + 4));
    const __m512i signs = _mm512_gf2p8affine_epi64_epi8(sign_bytes, matrices, 0);
    codes[0] = tables[0].look_up(select_bits(0x07, levels, signs));
    codes[1] = tables[1].look_up(select_bits(0x38, levels, signs));
}

// ---------------------------------------------------------------- activations

void turn(BlockK& x) {
    // Eight times eight bytes: a run of each place in an entry.
    const __m512i by_place = _mm512_set_epi8(63, 55, 47, 39, 31, 23, 15, 7, 62, 54, 46, 38, 30, 22, 14, 6,  //
                                             61, 53, 45, 37, 29, 21, 13, 5, 60, 52, 44, 36, 28, 20, 12, 4,  //
                                             59, 51, 43, 35, 27, 19, 11, 3, 58, 50, 42, 34, 26, 18, 10, 2,  //
                                             57, 49, 41, 33, 25, 17, 9, 1, 56, 48, 40, 32, 24, 16, 8, 0);
    for (int m = 0; m < 4; ++m) {
        alignas(64) int8_t runs[2][4][8];
        _mm512_store_si512(runs, _mm512_permutexvar_epi8(by_place, load512(x.q + 64 * m)));
        for (int half = 0; half < 2; ++half) {
            for (int j = 0; j < 4; ++j) std::memcpy(x.turned[j][half] + 8 * m, runs[half][j], 8);
        }
    }
}

// ---------------------------------------------------------------- what rows have in common

// Sums over the lower and the upper half of two vectors, and over four.
inline __m128i add_across(const __m512i (&v)[2]) {
    __m512i sum = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_i64x2(sum, sum, 0xb1));
    return _mm_unpacklo_epi32(_mm512_castsi512_si128(sum), _mm512_extracti32x4_epi32(sum, 2));
}
inline __m128i add_across(const __m512i (&v)[4]) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline void prefetch(const uint8_t* block, int n_bytes) {
    for (int i = 0; i < n_bytes; i += 64) _mm_prefetch((const char*)(block + kPrefetchBytes + i), _MM_HINT_T0);
}

// The d's of four blocks, in that unit.
inline __m128 four_d(const uint8_t* const blocks[4], float unit) {
    const uint64_t bits = uint64_t(load_u16(blocks[0])) | uint64_t(load_u16(blocks[1])) << 16 |
                          uint64_t(load_u16(blocks[2])) << 32 | uint64_t(load_u16(blocks[3])) << 48;
    return _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi64_si128((long long)bits)), _mm_set1_ps(unit));
}

inline __m128 add_term(__m128 total, float x_scale, __m128 d, __m128i sum) {
    return _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x_scale), _mm_mul_ps(d, _mm_cvtepi32_ps(sum))));
}

// -kCodeOffset times the sums of activations of the eight groups.
inline __m256i offset_of_groups(const BlockK& x) {
    return _mm256_mullo_epi32(_mm256_cvtepi16_epi32(load128(x.sum32)), _mm256_set1_epi32(-kCodeOffset));
}

// ---------------------------------------------------------------- IQ2: two rows in a register

// All types have kRows, how many rows' blocks are taken apart together, and `dot`, the lanes of which are to be added
// up, each half for itself where there are two rows.

// Groups of 32: a lane has four indices of one group.
struct BigGroups {
    static constexpr int kRows = 2;
    __m512i codes[8], scales;

    __m512i dot(const BlockK& x) const {
        const __m256i offset = offset_of_groups(x);
        __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(offset), offset, 1), high = _mm512_setzero_si512();
        for (int j = 0; j < 4; ++j) {
            low = _mm512_dpbusd_epi32(low, codes[j], twice256(x.turned[j][0]));
            high = _mm512_dpbusd_epi32(high, codes[j + 4], twice256(x.turned[j][1]));
        }
        return _mm512_mullo_epi32(_mm512_add_epi32(low, high), scales);
    }
};

// Groups of 16: a word has two indices of one group.
struct SmallGroups {
    static constexpr int kRows = 2;
    __m512i codes[8], scales;

    __m512i dot(const BlockK& x) const {
        const __m512i minus_sums = _mm512_sub_epi16(_mm512_setzero_si512(), twice256(x.sum16));
        __m512i low = _mm512_slli_epi32(_mm512_dpwssd_epi32(_mm512_setzero_si512(), scales, minus_sums), 6);
        __m512i high = _mm512_setzero_si512();
        for (int j = 0; j < 4; ++j) {
            const __m512i first = _mm512_maddubs_epi16(codes[j], twice256(x.turned[j][0]));
            const __m512i second = _mm512_maddubs_epi16(codes[j + 4], twice256(x.turned[j][1]));
            low = _mm512_dpwssd_epi32(low, first, scales);
            high = _mm512_dpwssd_epi32(high, second, scales);
        }
        return _mm512_add_epi32(low, high);
    }
    // 2 s + 1 of the sixteen nibbles at a, and of those at b.
    void set_scales(const uint8_t* a, const uint8_t* b) {
        const auto at = [](int first) {  // eight bits from the one below the nibble on
            return (long long)(uint64_t(first & 63) | uint64_t(first + 4) << 16 | uint64_t(first + 8) << 32 |
                               uint64_t(first + 12) << 48);
        };
        const __m512i shifts = _mm512_setr_epi64(at(-1), at(15), at(31), at(47), at(-1), at(15), at(31), at(47));
        scales = keep_and_set(_mm512_multishift_epi64_epi8(shifts, repeat(a, b)), 0x001e001e, 0x00010001);
    }
};

struct Iq2Xxs : BigGroups {
    static constexpr int kBytes = 66;
    static __m128 d(const uint8_t* const blocks[4]) { return four_d(blocks, 0.125f); }

    explicit Iq2Xxs(const uint8_t* const blocks[2]) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        const __m512i a = load512(blocks[0] + 2), b = load512(blocks[1] + 2);
        const __m512i index = _mm512_permutex2var_epi32(a, even, b);
        const __m512i packed = _mm512_permutex2var_epi32(a, odd, b);  // 4 * 7 bits of signs, 4 of scale
        const Quarter quarter(index);
        const __m512i signs = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kSevens), packed);
        codes_of_four(quarter.look_up(kIq2XxsPlanes, index), signs, kSevenSigns, 0, codes);
        codes_of_four(quarter.look_up(kIq2XxsPlanes + 256, index), signs, kSevenSigns, 4, codes + 4);
        scales = _mm512_or_si512(_mm512_srli_epi32(packed, 27), _mm512_set1_epi32(1));
    }
};

struct Iq2Xs : SmallGroups {
    static constexpr int kBytes = 74;
    static __m128 d(const uint8_t* const blocks[4]) { return four_d(blocks, 0.125f); }

    explicit Iq2Xs(const uint8_t* const blocks[2]) {
        const __m512i a = load512(blocks[0] + 2), b = load512(blocks[1] + 2);  // 9 bits of index, 7 of signs
        const __m512i bytes = load512(kCounting), even = _mm512_add_epi8(bytes, bytes);
        const __m512i index = _mm512_permutex2var_epi8(a, even, b);
        const __m512i rest = _mm512_permutex2var_epi8(a, _mm512_add_epi8(even, _mm512_set1_epi8(1)), b);
        const __mmask64 bit8 = _mm512_test_epi8_mask(rest, _mm512_set1_epi8(1));
        const Quarter quarter(index);
        codes_of_four(quarter.look_up(kIq2XsPlanes, index, bit8), rest, kHighSevenSigns, 0, codes);
        codes_of_four(quarter.look_up(kIq2XsPlanes + 512, index, bit8), rest, kHighSevenSigns, 4, codes + 4);
        set_scales(blocks[0] + 66, blocks[1] + 66);
    }
};

struct Iq2S : SmallGroups {
    static constexpr int kBytes = 82;
    static __m128 d(const uint8_t* const blocks[4]) { return four_d(blocks, 0.125f); }

    explicit Iq2S(const uint8_t* const blocks[2]) {
        const __m512i index = join(blocks[0] + 2, blocks[1] + 2);
        const __m512i bytes = load512(kCounting), shifts = _mm512_add_epi8(bytes, bytes);  // of two bits each, mod 64
        const __m512i rest = _mm512_multishift_epi64_epi8(shifts, repeat(blocks[0] + 66, blocks[1] + 66));
        const __mmask64 bit8 = _mm512_test_epi8_mask(rest, _mm512_set1_epi8(1));
        const __mmask64 bit9 = _mm512_test_epi8_mask(rest, _mm512_set1_epi8(2));
        const Quarter quarter(index);
        const auto look_up = [&](const uint8_t* plane) {
            return _mm512_mask_blend_epi8(bit9, quarter.look_up(plane, index, bit8),
                                          quarter.look_up(plane + 512, index, bit8));
        };
        const __m512i signs = join(blocks[0] + 34, blocks[1] + 34);
        codes_of_four(look_up(kIq2SPlanes), signs, kEightSigns, 0, codes);
        codes_of_four(look_up(kIq2SPlanes + 1024), signs, kEightSigns, 4, codes + 4);
        set_scales(blocks[0] + 74, blocks[1] + 74);
    }
};

// ---------------------------------------------------------------- IQ3: a row in a register

// Even indices, then odd ones, so that lanes i and i + 8 are both of group i.
struct Threes {
    static constexpr int kRows = 1;
    __m512i codes[4], scales;

    __m512i dot(const BlockK& x) const {
        __m512i sum = _mm512_zextsi256_si512(offset_of_groups(x));
        for (int j = 0; j < 4; ++j) sum = _mm512_dpbusd_epi32(sum, codes[j], load512(x.turned[j]));
        return _mm512_mullo_epi32(sum, scales);
    }
    // Where those are in 64 bytes or bits.
    static __m512i even_then_odd() {
        const __m512i i = load512(kCounting), odd = _mm512_and_si512(_mm512_srli_epi16(i, 5), _mm512_set1_epi8(1));
        return _mm512_or_si512(_mm512_add_epi8(i, i), odd);
    }
    void set_codes(const CodeTable tables[2], __m512i low, __m512i high, __m512i sign_bytes, const SignBits& of) {
        codes_of_two(tables, low, sign_bytes, of, 0, codes);
        codes_of_two(tables, high, sign_bytes, of, 2, codes + 2);
    }
};

struct Iq3Xxs : Threes {
    static constexpr int kBytes = 98;
    static constexpr CodeTable kCodes[2] = {{kIq3XxsLevels, 0, 3}, {kIq3XxsLevels, 3, 0}};
    static __m128 d(const uint8_t* const blocks[4]) { return four_d(blocks, 0.25f); }

    explicit Iq3Xxs(const uint8_t* const blocks[1]) {
        const __m512i index = _mm512_permutexvar_epi8(even_then_odd(), load512(blocks[0] + 2));
        const __m512i packed = twice256(blocks[0] + 66);  // 4 * 7 bits of signs, 4 of scale
        const Quarter quarter(index);
        set_codes(kCodes, quarter.look_up(kIq3XxsPlanes, index), quarter.look_up(kIq3XxsPlanes + 256, index),
                  _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kSevens), packed), kSevenSigns);
        scales = _mm512_or_si512(_mm512_srli_epi32(packed, 27), _mm512_set1_epi32(1));
    }
};

struct Iq3S : Threes {
    static constexpr int kBytes = 110;
    static constexpr CodeTable kCodes[2] = {{kIq3SLevels, 0, 3}, {kIq3SLevels, 3, 0}};
    static __m128 d(const uint8_t* const blocks[4]) { return four_d(blocks, 1.0f); }

    explicit Iq3S(const uint8_t* const blocks[1]) {
        const __m512i order = even_then_odd();
        const __m512i index = _mm512_permutexvar_epi8(order, load512(blocks[0] + 2));
        const __m512i high = _mm512_multishift_epi64_epi8(order, repeat(blocks[0] + 66));
        const __mmask64 bit8 = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1));
        const Quarter quarter(index);
        set_codes(kCodes, quarter.look_up(kIq3SPlanes, index, bit8), quarter.look_up(kIq3SPlanes + 512, index, bit8),
                  twice256(blocks[0] + 74), kEightSigns);
        // Each of eight nibbles, from the bit below it on.
        const __m512i shifts = _mm512_setr_epi32(31, 35, 39, 43, 47, 51, 55, 59, 31, 35, 39, 43, 47, 51, 55, 59);
        scales = keep_and_set(_mm512_multishift_epi64_epi8(shifts, repeat(blocks[0] + 102)), 0x1e, 1);
    }
};

// ---------------------------------------------------------------- IQ1: too many entries for registers

// The i-th entries of the eight groups of 32, for each i of four.
struct Entries {
    static constexpr int kRows = 1;
    // Activations in that order.
    struct Turned {
        __m512i q[4];

        explicit Turned(const BlockK& x) {
            const __m512i first = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13);
            const __m512i second = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
            const __m512i a = load512(x.q), b = load512(x.q + 64), c = load512(x.q + 128), d = load512(x.q + 192);
            const __m512i ab = _mm512_permutex2var_epi64(a, first, b), cd = _mm512_permutex2var_epi64(c, first, d);
            const __m512i ef = _mm512_permutex2var_epi64(a, second, b), gh = _mm512_permutex2var_epi64(c, second, d);
            q[0] = _mm512_shuffle_i64x2(ab, cd, 0x44);
            q[1] = _mm512_shuffle_i64x2(ab, cd, 0xee);
            q[2] = _mm512_shuffle_i64x2(ef, gh, 0x44);
            q[3] = _mm512_shuffle_i64x2(ef, gh, 0xee);
        }
    };
    __m512i codes[4];

    // 64 bits per group: 4 bytes at p, a word at p + 32.
    static __m512i load_groups(const uint8_t* p) {
        const __m512i words = _mm512_cvtepu16_epi64(load128(p + 32));
        return _mm512_or_si512(_mm512_cvtepu32_epi64(load256(p)), _mm512_slli_epi64(words, 32));
    }
    // `shifts`: where in a group the bytes of its four indices are, of 11 bits each.
    void set_codes(__m512i groups, long long shifts) {
        const __m512i packed = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(shifts), groups);
        const __m512i index = _mm512_and_si512(packed, _mm512_set1_epi16(0x7ff));
        const __m512i mask = _mm512_set1_epi64(0xffff);
        codes[0] = _mm512_i64gather_epi64(_mm512_and_si512(index, mask), kIq1Raised, 8);
        codes[1] = _mm512_i64gather_epi64(_mm512_and_si512(_mm512_srli_epi64(index, 16), mask), kIq1Raised, 8);
        codes[2] = _mm512_i64gather_epi64(_mm512_and_si512(_mm512_srli_epi64(index, 32), mask), kIq1Raised, 8);
        codes[3] = _mm512_i64gather_epi64(_mm512_srli_epi64(index, 48), kIq1Raised, 8);
    }
};

// Codes come 8 too large, and the eighth is added as 1 or -1 with them.
struct Iq1S : Entries {
    static constexpr int kBytes = 50;
    __m512i scales;
    __mmask8 is_minus;
    static __m128 d(const uint8_t* const blocks[4]) { return four_d(blocks, 0.125f); }

    explicit Iq1S(const uint8_t* const blocks[1]) {
        const __m512i groups = load_groups(blocks[0] + 2);
        set_codes(groups, 0x2918261023082000);
        is_minus = _mm512_test_epi64_mask(groups, _mm512_set1_epi64(1ll << 47));
        scales = keep_and_set(_mm512_multishift_epi64_epi8(_mm512_set1_epi32(43), groups), 0xe, 1);
    }
    __m512i dot(const BlockK& x) const {
        const Turned turned(x);
        const __m256i sums = _mm256_cvtepi16_epi32(load128(x.sum32));
        const __m512i plus = _mm512_cvtepu32_epi64(_mm256_mullo_epi32(sums, _mm256_set1_epi32(-7)));
        const __m512i minus = _mm512_cvtepu32_epi64(_mm256_mullo_epi32(sums, _mm256_set1_epi32(-9)));
        __m512i sum = _mm512_mask_blend_epi64(is_minus, plus, minus);
        for (int i = 0; i < 4; ++i) sum = _mm512_dpbusd_epi32(sum, codes[i], turned.q[i]);
        return _mm512_mullo_epi32(sum, scales);
    }
};

struct Iq1M : Entries {
    static constexpr int kBytes = 56;
    __m512i first_scales, second_scales;
    static __m128 d(const uint8_t* const blocks[4]) {
        uint8_t halves[4][2];
        const uint8_t* at[4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* words = blocks[r] + 48;
            halves[r][0] = uint8_t(words[1] >> 4 | (words[3] & 240));
            halves[r][1] = uint8_t(words[5] >> 4 | (words[7] & 240));
            at[r] = halves[r];
        }
        return four_d(at, 0.125f);
    }

    explicit Iq1M(const uint8_t* const blocks[1]) {
        const __m512i groups = load_groups(blocks[0]);
        set_codes(groups, 0x2c18281024082000);
        for (int i = 0; i < 4; ++i) {
            const __mmask8 is_plus = _mm512_testn_epi64_mask(groups, _mm512_set1_epi64(1ll << (35 + 4 * i)));
            codes[i] = _mm512_mask_add_epi64(codes[i], is_plus, codes[i], _mm512_set1_epi8(2));
        }
        // From the bit below each scale on.
        const __m512i shifts = _mm512_setr_epi32(63, 63, 5, 5, 15, 15, 21, 21, 31, 31, 37, 37, 47, 47, 53, 53);
        const __m512i packed = repeat(blocks[0] + 48);
        first_scales = keep_and_set(_mm512_multishift_epi64_epi8(shifts, packed), 0xe, 1);
        const __m512i next = _mm512_add_epi32(shifts, _mm512_set1_epi32(3));
        second_scales = keep_and_set(_mm512_multishift_epi64_epi8(next, packed), 0xe, 1);
    }
    __m512i dot(const BlockK& x) const {
        const Turned turned(x);
        const __m256i sums = load256(x.sum16);
        __m512i first = _mm512_cvtepu32_epi64(_mm256_madd_epi16(sums, _mm256_set1_epi32(-9 & 0xffff)));
        __m512i second = _mm512_cvtepu32_epi64(_mm256_madd_epi16(sums, _mm256_set1_epi32(-9 * 0x10000)));
        for (int i = 0; i < 2; ++i) {
            first = _mm512_dpbusd_epi32(first, codes[i], turned.q[i]);
            second = _mm512_dpbusd_epi32(second, codes[i + 2], turned.q[i + 2]);
        }
        return _mm512_add_epi32(_mm512_mullo_epi32(first, first_scales), _mm512_mullo_epi32(second, second_scales));
    }
};

// ---------------------------------------------------------------- rows

template <class B, int T>
void dot_codebook_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    __m128 totals[T];
    for (int i = 0; i < T; ++i) totals[i] = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    for (int64_t b = 0; b < a.cols / kKBlock; ++b, x += a.n) {
        const uint8_t* blocks[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            prefetch(blocks[r], B::kBytes);
        }
        __m512i sums[T][4 / B::kRows];
        for (int r = 0; r < 4; r += B::kRows) {
            const B codes(blocks + r);
            for (int i = 0; i < T; ++i) sums[i][r / B::kRows] = codes.dot(x[i]);
        }
        const __m128 d = B::d(blocks);
        for (int i = 0; i < T; ++i) totals[i] = add_term(totals[i], x[i].scale, d, add_across(sums[i]));
    }
    for (int i = 0; i < T; ++i) _mm_storeu_ps(out + 4 * i, totals[i]);
}
