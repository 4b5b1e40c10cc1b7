// The gate of TopK SAEs: each token's k-th largest rank among its rivals, a part of them at a time.
//
//   rank = pre, or |pre| by magnitude; NaN ranks as infinity (with a gain: of gain · pre)
//   threshold[t, g] = the number just below the k-th largest rank of group g, and 0 at least unless
//   by magnitude: a latent is off if its rank is not above it.
//
// Parallelisation: a CTA of four warps merges a part of the rivals' pre-activations into one
// token's k largest so far. A thread keeps sixteen of the part in registers, and of the list every
// 128th. A part ends after one look where none of its ranks is above the floor, the least of the
// list. Otherwise the k-th largest of both is found bit by bit: 32 counts at most, and none for
// bits that the floor decides. A part may end groups and begin others; groups that begin and end in
// one part need no list.
// Bytes moved: 4 · T · F read, the list (4 · T · k) read and written where a part has a larger
// rank. Of masked tokens nothing is read.
// Determinism: the k-th largest of a set does not depend on its order or its parts. Counts are
// whole numbers.
#include "device.cuh"
#include "params.cuh"
#include "tokens.cuh"

namespace {

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / 32;
// Rivals of a part that a thread keeps.
constexpr uint32_t OWN = 16;

// Ranks in their order as whole numbers, all of them above 0, which stands for none.
DEVICE uint32_t key_of(float pre, bool by_magnitude) {
    const float rank = by_magnitude ? fabsf(pre) : pre;
    const uint32_t bits = rank != rank ? 0x7f800000u : bits_of_float(rank);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float rank_of(uint32_t key) {
    if (key == 0) return float_of_bits(0xff800000u);
    return float_of_bits(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The next number below; minus infinity has none.
DEVICE float just_below(float x) {
    const uint32_t bits = bits_of_float(x);
    if (x == 0.0f) return float_of_bits(0x80000001u);
    if (bits == 0xff800000u) return x;
    return float_of_bits(bits >> 31 ? bits + 1 : bits - 1);
}

// Numbers that the warps tell each other: twice one for each, so that one barrier is enough.
struct Exchange {
    uint32_t *sums;
    uint32_t turn;

    DEVICE_MEMBER const uint32_t *tell(uint32_t own) {
        turn ^= WARPS;
        if (thread_index() % 32 == 0) sums[turn + thread_index() / 32] = own;
        sync_block();
        return sums + turn;
    }
};

DEVICE uint32_t sum_in_block(uint32_t x, Exchange &exchange) {
    const uint32_t *sums = exchange.tell(sum_in_warp(x));
    uint32_t sum = 0;
    UNROLL
    for (uint32_t warp = 0; warp < WARPS; warp++) sum += sums[warp];
    return sum;
}

// The sum over the threads before this one, and over all.
struct Place {
    uint32_t before, all;
};

// Of numbers of so many bits.
template <int BITS>
DEVICE Place place_in_block(uint32_t x, Exchange &exchange) {
    const uint32_t lane = thread_index() % 32, own = thread_index() / 32;
    Place place = {0, 0};
    uint32_t warp_sum = 0;
    UNROLL
    for (int bit = 0; bit < BITS; bit++) {
        const uint32_t votes = vote_in_warp(x >> bit & 1);
        place.before += count_bits(votes & ((1u << lane) - 1)) << bit;
        warp_sum += count_bits(votes) << bit;
    }
    const uint32_t *sums = exchange.tell(warp_sum);
    UNROLL
    for (uint32_t warp = 0; warp < WARPS; warp++) {
        if (warp < own) place.before += sums[warp];
        place.all += sums[warp];
    }
    return place;
}

// A token's keys: this thread's of the part, and the list, unless the group has only begun.
struct Keys {
    uint32_t own[OWN];
    uint32_t *list;
    uint32_t k;
    bool has_list;

    DEVICE_MEMBER void load(const float *pre, uint32_t count, bool by_magnitude) {
        UNROLL
        for (uint32_t i = 0; i < OWN; i++) {
            const uint32_t rival = i * THREADS + thread_index();
            own[i] = rival < count ? key_of(pre[rival], by_magnitude) : 0;
        }
    }

    // This thread's of the part that are above a key.
    DEVICE_MEMBER uint32_t above(uint32_t key) const {
        uint32_t count = 0;
        UNROLL
        for (uint32_t i = 0; i < OWN; i++) count += own[i] > key;
        return count;
    }

    // The k-th largest of both, or 0 where there are fewer. The list has k from the floor on.
    DEVICE_MEMBER uint32_t kth(uint32_t floor, Exchange &exchange) const {
        uint32_t found = 0;
        NO_UNROLL
        for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
            const uint32_t attempt = found | bit;
            if (attempt > floor) {
                uint32_t count = above(attempt - 1);
                if (has_list) {
                    for (uint32_t i = thread_index(); i < k; i += THREADS) {
                        count += list[i] >= attempt;
                    }
                }
                if (sum_in_block(count, exchange) < k) continue;
            }
            found = attempt;
        }
        return found;
    }

    // Makes the list the k largest of both. What is not above the k-th gives way to the part's keys
    // that are, and then to the k-th itself.
    DEVICE_MEMBER void merge(uint32_t kth, uint32_t *larger, Exchange &exchange) const {
        static_assert(OWN < 32, "a count of five bits");
        Place place = place_in_block<5>(above(kth), exchange);
        const uint32_t newcomers = place.all;
        UNROLL
        for (uint32_t i = 0; i < OWN; i++) {
            if (own[i] > kth) larger[place.before++] = own[i];
        }
        uint32_t taken = 0;
        NO_UNROLL
        for (uint32_t start = 0; start < k; start += THREADS) {
            const uint32_t i = start + thread_index();
            const bool gives_way = i < k && (!has_list || list[i] <= kth);
            // Its barrier also shows everyone the newcomers.
            place = place_in_block<1>(gives_way, exchange);
            const uint32_t n = taken + place.before;
            if (gives_way) list[i] = n < newcomers ? larger[n] : kth;
            taken += place.all;
        }
    }
};

} // namespace

KERNEL(blockem_topk, TopKParams, THREADS, 1) {
    const uint64_t t = block_index();
    if (mask_of(p.mask, t) == 0.0f) return;
    uint32_t *larger = reinterpret_cast<uint32_t *>(shared_memory());
    Exchange exchange = {larger + OWN * THREADS, 0};
    NO_UNROLL
    for (uint32_t start = 0; start < p.count;) {
        const uint32_t group = (p.first + start) / p.group_size;
        const uint32_t group_end = (group + 1) * p.group_size - p.first;
        const bool begins = group * p.group_size == p.first + start;
        const bool ends = group_end <= p.count;
        const uint32_t end = ends ? group_end : p.count;
        Keys keys;
        keys.list = p.largest + t * p.k;
        keys.k = p.k;
        keys.has_list = !begins;
        keys.load(p.pre + t * p.pre_stride + start, end - start, p.by_magnitude);
        uint32_t floor = begins ? 0 : p.floors[t];
        // A barrier as well: everyone has read the floor.
        if (any_in_block(keys.above(floor) > 0)) {
            floor = keys.kth(floor, exchange);
            if (!ends) keys.merge(floor, larger, exchange);
        }
        if (thread_index() == 0) {
            if (ends) {
                const float below = just_below(rank_of(floor));
                p.thresholds[t * p.groups + group] = p.by_magnitude || below > 0.0f ? below : 0.0f;
            } else {
                p.floors[t] = floor;
            }
        }
        start = end;
    }
}
