// Hidden states pushed along decoder directions, a condition in each row of a batch.
//
//   h[b, s, :] += factor · direction[row[b], :],   factor = strength[b] · scale · mask[b, s]
//
// where the factor is rounded to f32 once, the sum is an fma in f32, and narrower hidden states round
// it once more: the bits of the CPU. Nothing is read or written where row is -1, or mask or strength
// is 0. A row that is neither -1 nor a direction makes its positions NaN: the host does not see it.
//
// Parallelisation: a CTA takes 1024 columns of a position, eight adjacent ones for each thread, and
// goes on to other positions where there are more than fill the device.
// Bytes moved: h of the positions that are pushed, once read and once written; directions come out of
// the cache.
#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr uint32_t THREADS = 128;

// What a position's direction is multiplied by; 0: it stays as it is.
struct Push {
    float factor;
    const float *direction;

    DEVICE_MEMBER Push(const SteerParams &p, double scale, uint64_t b, uint64_t s) {
        MaskParams mask = p.mask;
        if (mask.data) mask.data += b * p.mask_stride * (mask.is_f32 ? 4 : 1);
        const float share = mask_of(mask, s);
        const int64_t row = p.row[b * p.row_stride];
        factor = 0.0f;
        direction = p.directions;
        if (share == 0.0f || row == -1) return;
        if (row < 0 || row >= (int64_t)p.count) {
            factor = float_of_bits(0x7fffffff);
            return;
        }
        const float strength = p.strength[b * p.strength_stride];
        if (strength == 0.0f) return;
        factor = (float)mul_rn(mul_rn((double)strength, scale), (double)share);
        direction += row * p.directions_stride;
    }
};

template <uint32_t DTYPE>
DEVICE void narrow(Chunk (&chunks)[CHUNKS_OF_8<DTYPE>], const Row8 &x) {
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        if (DTYPE == DTYPE_F32) {
            chunks[i / 4 % CHUNKS_OF_8<DTYPE>].v[i % 4] = bits_of_float(x.v[i]);
            chunks[i / 4 % CHUNKS_OF_8<DTYPE>].v[i % 4 + 1] = bits_of_float(x.v[i + 1]);
        } else if (DTYPE == DTYPE_F16) {
            chunks[0].v[i / 2] = round_to_f16(x.v[i], x.v[i + 1]);
        } else {
            chunks[0].v[i / 2] = round_to_bf16(x.v[i], x.v[i + 1]);
        }
    }
}

// Eight columns, or as many as are left of the row.
template <uint32_t DTYPE>
DEVICE void store_columns(unsigned char *at, const Row8 &x, uint32_t left, bool is_aligned) {
    Chunk chunks[CHUNKS_OF_8<DTYPE>];
    narrow<DTYPE>(chunks, x);
    if (is_aligned && left >= 8) {
        UNROLL
        for (int i = 0; i < CHUNKS_OF_8<DTYPE>; i++) store_chunk(at + 16 * i, chunks[i]);
        return;
    }
    UNROLL
    for (uint32_t i = 0; i < 8; i++) {
        if (i >= left) continue;
        if (DTYPE == DTYPE_F32) {
            const uint32_t bits = chunks[i / 4 % CHUNKS_OF_8<DTYPE>].v[i % 4];
            reinterpret_cast<uint32_t *>(at)[i] = bits;
        } else {
            reinterpret_cast<uint16_t *>(at)[i] = (uint16_t)(chunks[0].v[i / 2] >> i % 2 * 16);
        }
    }
}

DEVICE void push_columns(const SteerParams &p, const HiddenParams &hidden, const Push &push,
                         uint64_t s, uint32_t column) {
    Row8 h, direction;
    const unsigned char *from = reinterpret_cast<const unsigned char *>(push.direction + column);
    const Chunk chunks[2] = {load_chunk(from), load_chunk(from + 16)};
    widen<DTYPE_F32>(direction, chunks);
    load_hidden(h, hidden, hidden.dtype, s, column, p.d_in);
    UNROLL
    for (int i = 0; i < 8; i++) h.v[i] = fma_rn(push.factor, direction.v[i], h.v[i]);
    const uint32_t left = p.d_in - column;
    const uint64_t at = (s * hidden.stride + column) * (hidden.dtype == DTYPE_F32 ? 4 : 2);
    unsigned char *to = const_cast<unsigned char *>(hidden.data) + at;
    if (hidden.dtype == DTYPE_F32) store_columns<DTYPE_F32>(to, h, left, hidden.is_aligned);
    else if (hidden.dtype == DTYPE_F16) store_columns<DTYPE_F16>(to, h, left, hidden.is_aligned);
    else store_columns<DTYPE_BF16>(to, h, left, hidden.is_aligned);
}

} // namespace

KERNEL(blockem_steer, SteerParams, THREADS, 1) {
    const uint32_t tiles = (uint32_t)p.column_tiles;
    const uint32_t column = (block_index() % tiles * THREADS + thread_index()) * 8;
    if (column >= p.d_in) return;
    const double scale = mul_rn(p.scale, p.scale_tensor ? (double)*p.scale_tensor : 1.0);
    const uint64_t tokens = p.batch * p.positions, step = block_count() / tiles;
    for (uint64_t t = block_index() / tiles; t < tokens; t += step) {
        const uint64_t b = t / p.positions, s = t % p.positions;
        const Push push(p, scale, b, s);
        if (push.factor == 0.0f) continue;
        HiddenParams hidden = p.hidden;
        hidden.data += b * p.hidden_stride * (hidden.dtype == DTYPE_F32 ? 4 : 2);
        push_columns(p, hidden, push, s, column);
    }
}
