//! Sums over tokens for every latent of a dictionary, without keeping z of any.
//!
//! A worker takes some latents through all tokens, a tile at a time: its z, as a plan's kernels
//! compute it, and then each latent's sums in f64, token by token in their order. So a sum depends
//! on the tokens alone, not on the threads, and a call goes on where the one before has stopped.

use super::lanes::{Isa, LANES, Lanes, Line, Work, with_lanes};
use super::pack::{PANEL, Panels, bf16_lines, f32_lines, pack_bf16, pack_f32};
use super::slab::Kernels;
use super::threads::Threads;
use super::topk::{Rivals, Space, Tokens};
use crate::backend::{
    Gate, Mask, Matrix, OwnedGate, OwnedRows, RIVALS_AT_ONCE, ReadRows, Rows, StatsBackend,
    StatsCall,
};
use crate::error::{Result, bail};
use crate::stats::rows;
use crate::tensor::Stream;

/// Latents of a task, and tokens of a tile: a worker's two tiles stay in the second-level cache.
const PART: usize = 256;
const TOKENS: usize = 96;
/// Tokens for which a sum is loaded and stored once.
const AT_ONCE: usize = 4;
const _: () = assert!(PART.is_multiple_of(PANEL) && RIVALS_AT_ONCE.is_multiple_of(PART));
/// Numbers from one row of a tile to the next: not a power of two, so that they share no cache set.
const STRIDE: usize = PART + LANES;
const TILE: usize = TOKENS * STRIDE;
/// The same for the two products of each latent of a GLU encoder.
const PRODUCT_STRIDE: usize = 2 * PART + LANES;
const PRODUCT_TILE: usize = TOKENS * PRODUCT_STRIDE;

/// All rows of a dictionary, packed, and threads.
pub(crate) struct CpuStats {
    isa: Isa,
    d_in: usize,
    d_sae: usize,
    /// Rows of each latent.
    width: usize,
    /// All but the weights, of [`PART`] latents each.
    parts: Vec<OwnedRows>,
    panels: Vec<Line>,
    bf16_panels: Option<Vec<Line>>,
    /// Of a TopK gate: [F]
    rivals: Option<OwnRivals>,
    threads: Threads,
}

/// What places every latent among its rivals, beside its row.
#[derive(Default)]
struct OwnRivals {
    bias: Vec<f32>,
    glu_bias: Option<Vec<f32>>,
    gain: Option<Vec<f32>>,
}

impl CpuStats {
    /// `num_threads` 0 means one for each available core.
    pub fn new(
        d_in: usize,
        d_sae: usize,
        read: ReadRows<'_>,
        num_threads: usize,
    ) -> Result<CpuStats> {
        CpuStats::with_isa(d_in, d_sae, read, num_threads, Isa::detect())
    }

    pub(super) fn with_isa(
        d_in: usize,
        d_sae: usize,
        read: ReadRows<'_>,
        num_threads: usize,
        isa: Isa,
    ) -> Result<CpuStats> {
        // Without a row: what all of them have.
        let width = read(0..0)?.borrow().width();
        let mut stats = CpuStats {
            isa,
            d_in,
            d_sae,
            width,
            parts: Vec::with_capacity(d_sae.div_ceil(PART)),
            panels: reserved(f32_lines(d_sae * width, d_in), d_in, d_sae)?,
            bf16_panels: None,
            rivals: None,
            threads: Threads::pool(num_threads),
        };
        for start in (0..d_sae).step_by(RIVALS_AT_ONCE) {
            let some = read(start..d_sae.min(start + RIVALS_AT_ONCE))?;
            stats.add(&some.borrow())?;
        }
        Ok(stats)
    }

    /// Packs the rows that follow.
    fn add(&mut self, some: &Rows<'_>) -> Result<()> {
        let zero = Line([0.0; LANES]);
        let first = self.panels.len();
        self.panels.resize(first + f32_lines(some.products(), self.d_in), zero);
        pack_f32(some, &mut self.panels[first..]);
        if let Gate::TopK(gate) = some.gate {
            // A latent must compare with its own value exactly, so rows are kept in one form.
            let rivals = self.rivals.get_or_insert_default();
            rivals.bias.extend(some.bias);
            if let Some(bias) = some.glu_bias {
                rivals.glu_bias.get_or_insert_default().extend(bias);
            }
            if let Some(gain) = &gate.gain {
                rivals.gain.get_or_insert_default().extend(gain);
            }
        } else if self.isa.has_bf16_dot() {
            if self.bf16_panels.is_none() {
                let lines = bf16_lines(self.d_sae * self.width, self.d_in);
                self.bf16_panels = Some(reserved(lines, self.d_in, self.d_sae)?);
            }
            let panels = self.bf16_panels.get_or_insert_default();
            let first = panels.len();
            panels.resize(first + bf16_lines(some.products(), self.d_in), zero);
            pack_bf16(some, &mut panels[first..]);
        }
        for start in (0..some.count()).step_by(PART) {
            let range = start..some.count().min(start + PART);
            self.parts.push(some.part_without_weight(range));
        }
        Ok(())
    }

    /// What computes z of a part's latents.
    fn kernels(&self, part: usize) -> Kernels<'_> {
        let first = part * PART * self.width;
        let panels = Panels::f32(&self.panels, self.d_in);
        let rivals = self.rivals.as_ref().map(|rivals| Rivals {
            panels,
            bias: &rivals.bias,
            glu_bias: rivals.glu_bias.as_deref(),
            gain: rivals.gain.as_deref(),
        });
        let bf16 = self.bf16_panels.as_ref().map(|lines| Panels::bf16(lines, self.d_in));
        Kernels {
            isa: self.isa,
            rows: self.parts[part].borrow(),
            panels: panels.starting_at(first),
            bf16: bf16.map(|panels| panels.starting_at(first)),
            rivals,
        }
    }

    /// Bytes of a workspace that thresholds of one side's tokens take.
    fn threshold_bytes(&self, tokens: usize) -> usize {
        match &self.parts[0].gate {
            OwnedGate::TopK(gate) => Space::bytes(gate, self.width, tokens, self.threads.count()),
            _ => 0,
        }
    }

    /// Numbers of a worker's tiles.
    fn worker_tiles(&self, sides: usize) -> usize {
        sides * TILE + if self.width > 1 { PRODUCT_TILE } else { 0 }
    }
}

/// Memory for so many lines, or an error where `Vec` would abort.
fn reserved(lines: usize, d_in: usize, d_sae: usize) -> Result<Vec<Line>> {
    let mut panels = Vec::new();
    if panels.try_reserve_exact(lines).is_err() {
        bail!(
            OutOfMemory,
            "{d_sae} latents of {d_in} inputs do not fit into memory; statistics keep them all"
        );
    }
    Ok(panels)
}

impl StatsBackend for CpuStats {
    fn numerics(&self) -> String {
        if self.bf16_panels.is_some() { "cpu-1-bf16dot".into() } else { "cpu-1".into() }
    }

    fn num_threads(&self) -> usize {
        self.threads.count()
    }

    fn workspace_size(&self, tokens: usize, has_base: bool) -> usize {
        let sides = 1 + has_base as usize;
        let workers = self.threads.count().min(self.parts.len());
        let tiles = workers * self.worker_tiles(sides) * size_of::<f32>();
        let thresholds = self.threshold_bytes(tokens).saturating_mul(sides);
        thresholds.saturating_add(tiles).min(isize::MAX as usize)
    }

    unsafe fn update(&self, call: &StatsCall, _: Stream) -> Result<()> {
        let first = self.kernels(0);
        let mut space = call.workspace;
        let mut side = |hidden: Matrix| {
            let tokens = Tokens { count: call.tokens, hidden, mask: call.mask };
            // SAFETY: the caller's promise.
            let (thresholds, rest) = unsafe { first.thresholds(&self.threads, &tokens, space) };
            space = rest;
            Side { hidden, thresholds }
        };
        let (tuned, base) = (side(call.hidden), call.base_hidden.map(side));
        let worker_tiles = self.worker_tiles(1 + base.is_some() as usize);
        let sides = Sides { tuned, base, tiles: space.data.cast(), worker_tiles, call: *call };
        let cost = call.tokens.saturating_mul(self.d_sae * self.width).saturating_mul(self.d_in);
        self.threads.each(self.parts.len(), cost, |worker, part| {
            let sides = &sides;
            // SAFETY: the caller's promise; every part has columns of the state of its own, every
            // worker its tiles.
            unsafe { sides.add(&self.kernels(part), worker, part * PART) }
        });
        if let Some(count) = call.token_count {
            // SAFETY: the caller's promise: the count and every token's share are there.
            unsafe {
                let start = if call.accumulate { *count } else { 0.0 };
                let share = |t| call.mask.map_or(1.0, |mask: Mask| mask.get(t) as f64);
                *count = (0..call.tokens).map(share).fold(start, |sum, m| sum + m);
            }
        }
        Ok(())
    }
}

/// Hidden states of one model.
struct Side {
    hidden: Matrix,
    /// Of a TopK gate.
    thresholds: Option<Space>,
}

/// What the workers of a call share.
struct Sides {
    tuned: Side,
    base: Option<Side>,
    /// Each worker's tile of either side, and of a GLU encoder one of products.
    tiles: *mut f32,
    worker_tiles: usize,
    call: StatsCall,
}

// SAFETY: the boundary checked that outputs overlap nothing; workers write disjoint columns of the
// state, and tiles of their own.
unsafe impl Sync for Sides {}

/// Tokens that count, with their shares: as many as a tile has.
struct Live {
    tokens: [usize; TOKENS],
    shares: [f32; TOKENS],
    len: usize,
}

impl Sides {
    /// Adds all tokens to the sums of a part's latents, which begin at `first`.
    ///
    /// # Safety
    /// As [`super::Backend`]; the part and the worker are the caller's alone.
    unsafe fn add(&self, kernels: &Kernels<'_>, worker: usize, first: usize) {
        let count = kernels.rows.count();
        // SAFETY: the caller's promise: the state has its rows, of F numbers each.
        let row = |row: usize| unsafe {
            let start = self.call.state.row(row).cast::<f64>().add(first);
            std::slice::from_raw_parts_mut(start, count)
        };
        let [mut tuned, mut base] = [rows::SUM, rows::BASE_SUM].map(|first| {
            let there = first == rows::SUM || self.base.is_some();
            there.then(|| Sums {
                sum: row(first),
                square_sum: row(first + rows::SQUARE_SUM),
                active: row(first + rows::ACTIVE),
                max: row(first + rows::MAX),
            })
        });
        let mut moves = self
            .base
            .as_ref()
            .map(|_| Moves { rise: row(rows::RISE_SQUARE_SUM), fall: row(rows::FALL_SQUARE_SUM) });
        if !self.call.accumulate {
            [&mut tuned, &mut base].into_iter().flatten().for_each(Sums::clear);
            moves.iter_mut().for_each(Moves::clear);
        }
        let sides = [Some(&self.tuned), self.base.as_ref()];
        let own = self.tiles.wrapping_add(worker * self.worker_tiles);
        let tile = |start: usize, stride: usize| {
            std::array::from_fn::<_, TOKENS, _>(|i| own.wrapping_add(start + i * stride))
        };
        let tiles = [0, 1].map(|side| tile(side * TILE, STRIDE));
        // Two products of a latent do not fit where it goes.
        let products = (kernels.rows.width() > 1)
            .then(|| tile((1 + self.base.is_some() as usize) * TILE, PRODUCT_STRIDE));
        let mut live = Live { tokens: [0; TOKENS], shares: [0.0; TOKENS], len: 0 };
        for t in 0..self.call.tokens {
            // SAFETY: the caller's promise: the token exists.
            let share = self.call.mask.map_or(1.0, |mask| unsafe { mask.get(t) });
            if share != 0.0 {
                (live.tokens[live.len], live.shares[live.len]) = (t, share);
                live.len += 1;
            }
            if live.len < TOKENS && t + 1 < self.call.tokens {
                continue;
            }
            let shares = &live.shares[..live.len];
            for ((side, tile), sums) in sides.iter().zip(&tiles).zip([&mut tuned, &mut base]) {
                let (Some(side), Some(sums)) = (side, sums) else { continue };
                let z = &tile[..live.len];
                let dot = products.as_ref().map_or(z, |products| &products[..live.len]);
                // SAFETY: the caller's promise; the tiles have rows of PART latents.
                unsafe {
                    side.latents(kernels, &live.tokens[..live.len], [dot, z]);
                    let work = AddSums { z, shares, sums };
                    with_lanes!(kernels.isa, L => L::enter(work));
                }
            }
            if let Some(moves) = &mut moves {
                let [z, base] = [&tiles[0][..live.len], &tiles[1][..live.len]];
                // SAFETY: both tiles have been written.
                unsafe {
                    let work = AddMoves { z, base, shares, moves };
                    with_lanes!(kernels.isa, L => L::enter(work));
                }
            }
            live.len = 0;
        }
    }
}

impl Side {
    /// # Safety
    /// The tokens exist, and each output has room for the kernels' products, or latents.
    unsafe fn latents(&self, kernels: &Kernels<'_>, tokens: &[usize], out: [&[*mut f32]; 2]) {
        let mut hidden = [std::ptr::null(); TOKENS];
        for (row, t) in hidden.iter_mut().zip(tokens) {
            // SAFETY: the caller's promise.
            *row = unsafe { self.hidden.row(*t) }.cast_const();
        }
        let thresholds = |i: usize| match &self.thresholds {
            // SAFETY: found for every token that counts, before this.
            Some(space) => unsafe { space.thresholds(tokens[i]) },
            None => &[][..],
        };
        // SAFETY: the caller's promise.
        unsafe { kernels.latents(self.hidden.dtype, &hidden[..tokens.len()], out, thresholds) }
    }
}

/// Of some latents over one side's tokens.
struct Sums<'a> {
    sum: &'a mut [f64],
    square_sum: &'a mut [f64],
    active: &'a mut [f64],
    max: &'a mut [f64],
}

impl Sums<'_> {
    fn clear(&mut self) {
        for row in [&mut self.sum, &mut self.square_sum, &mut self.active] {
            row.fill(0.0);
        }
        self.max.fill(f64::NEG_INFINITY);
    }
}

struct AddSums<'a, 'b> {
    z: &'a [*mut f32],
    shares: &'a [f32],
    sums: &'a mut Sums<'b>,
}

impl Work for AddSums<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let AddSums { z, shares, sums } = self;
        let count = sums.sum.len();
        // SAFETY: the caller's promise: a row of so many numbers.
        let row = |t: usize| unsafe { std::slice::from_raw_parts(z[t], count) };
        let several = z.len() / AT_ONCE * AT_ONCE;
        for t in (0..several).step_by(AT_ONCE) {
            sums.add([row(t), row(t + 1), row(t + 2), row(t + 3)], &shares[t..]);
        }
        for t in several..z.len() {
            sums.add([row(t)], &shares[t..]);
        }
    }
}

impl Sums<'_> {
    /// Adds tokens one after the other.
    #[inline(always)]
    fn add<const N: usize>(&mut self, tokens: [&[f32]; N], shares: &[f32]) {
        let Sums { sum, square_sum, active, max } = self;
        let count = sum.len();
        let (square_sum, active) = (&mut square_sum[..count], &mut active[..count]);
        let (max, tokens) = (&mut max[..count], tokens.map(|token| &token[..count]));
        let shares: [f64; N] = std::array::from_fn(|i| shares[i] as f64);
        for k in 0..count {
            for (token, share) in tokens.iter().zip(shares) {
                let z = token[k] as f64;
                sum[k] += share * z;
                square_sum[k] += share * (z * z);
                active[k] += if z != 0.0 { share } else { 0.0 };
                // NaN comes in, and stays.
                max[k] = if (z <= max[k]) | max[k].is_nan() { max[k] } else { z };
            }
        }
    }
}

/// Of some latents between the two sides.
struct Moves<'a> {
    rise: &'a mut [f64],
    fall: &'a mut [f64],
}

impl Moves<'_> {
    fn clear(&mut self) {
        self.rise.fill(0.0);
        self.fall.fill(0.0);
    }
}

struct AddMoves<'a, 'b> {
    z: &'a [*mut f32],
    base: &'a [*mut f32],
    shares: &'a [f32],
    moves: &'a mut Moves<'b>,
}

impl Work for AddMoves<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let AddMoves { z, base, shares, moves } = self;
        let count = moves.rise.len();
        // SAFETY: the caller's promise: rows of so many numbers.
        let row = |row: *mut f32| unsafe { std::slice::from_raw_parts(row.cast_const(), count) };
        let pair = |t: usize| (row(z[t]), row(base[t]));
        let several = z.len() / AT_ONCE * AT_ONCE;
        for t in (0..several).step_by(AT_ONCE) {
            moves.add([pair(t), pair(t + 1), pair(t + 2), pair(t + 3)], &shares[t..]);
        }
        for t in several..z.len() {
            moves.add([pair(t)], &shares[t..]);
        }
    }
}

impl Moves<'_> {
    /// Adds tokens, with z of both sides, one after the other.
    #[inline(always)]
    fn add<const N: usize>(&mut self, tokens: [(&[f32], &[f32]); N], shares: &[f32]) {
        let Moves { rise, fall } = self;
        let count = rise.len();
        let fall = &mut fall[..count];
        let tokens = tokens.map(|(z, base)| (&z[..count], &base[..count]));
        let shares: [f64; N] = std::array::from_fn(|i| shares[i] as f64);
        for k in 0..count {
            for ((z, base), share) in tokens.iter().zip(shares) {
                // As in the penalty: the difference in f32, its square in f64.
                let (up, down) = (z[k] - base[k], base[k] - z[k]);
                let up = if up <= 0.0 { 0.0 } else { up } as f64;
                let down = if down <= 0.0 { 0.0 } else { down } as f64;
                rise[k] += share * (up * up);
                fall[k] += share * (down * down);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::random::Random;
    use crate::backend::{OwnedGate, TopK, Workspace};
    use crate::sae::TokenNorm;
    use crate::tensor::DType;

    /// A dictionary, and hidden states of two models in f32.
    struct Problem {
        rows: OwnedRows,
        hidden: [Vec<f32>; 2],
        shares: Vec<f32>,
    }

    impl Problem {
        fn random(random: &mut Random, [tokens, f, d]: [usize; 3]) -> Problem {
            let norm = random.pick(&[TokenNorm::None, TokenNorm::Constant, TokenNorm::Layer]);
            let values: Vec<f32> = random.normals(f).iter().map(|b| 0.3 * b).collect();
            let topk = TopK {
                k: 1 + random.below(f.div_ceil(2)),
                group: vec![0; f],
                group_ends: vec![f],
                by_magnitude: random.below(2) == 0,
                gain: None,
            };
            let glu = random.below(3) == 0;
            let gate = match random.below(4) {
                0 => OwnedGate::Relu,
                1 => OwnedGate::Threshold(values),
                2 => OwnedGate::Gated(values),
                _ => OwnedGate::TopK(topk),
            };
            Problem {
                rows: OwnedRows {
                    d_in: d,
                    weight: random.rows(if glu { 2 * f } else { f }, d, d, norm),
                    bias: random.normals(f).iter().map(|b| 0.1 * b).collect(),
                    scale: None,
                    glu_bias: glu.then(|| random.normals(f)),
                    norm,
                    gate,
                    sign_weight: vec![1.0; f],
                },
                hidden: [random.normals(tokens * d), random.normals(tokens * d)],
                shares: (0..tokens).map(|_| random.pick(&[0.0, 1.0, 0.37])).collect(),
            }
        }

        fn f(&self) -> usize {
            self.rows.bias.len()
        }

        fn stats(&self, threads: usize, isa: Isa) -> CpuStats {
            let d = self.rows.d_in;
            let read = |range: std::ops::Range<usize>| {
                let row = d * self.rows.borrow().width();
                let weight = self.rows.weight[range.start * row..range.end * row].to_vec();
                Ok(OwnedRows { weight, ..self.rows.borrow().part_without_weight(range) })
            };
            CpuStats::with_isa(d, self.f(), &read, threads, isa).unwrap()
        }

        /// The state after some of the tokens, and their number, in memory of exactly their size.
        fn update(
            &self,
            stats: &CpuStats,
            state: &mut [f64],
            count: &mut f64,
            from: usize,
            to: usize,
        ) {
            let d = self.rows.d_in;
            let matrix = |of: usize| Matrix {
                data: self.hidden[of][from * d..to * d].as_ptr().cast_mut().cast(),
                dtype: DType::F32,
                row_stride: d,
            };
            let size = stats.workspace_size(to - from, true);
            let mut space = vec![Line([f32::NAN; LANES]); size.div_ceil(size_of::<Line>())];
            let call = StatsCall {
                tokens: to - from,
                hidden: matrix(0),
                base_hidden: Some(matrix(1)),
                mask: Some(Mask {
                    data: self.shares[from..].as_ptr().cast(),
                    dtype: DType::F32,
                    stride: 1,
                }),
                state: Matrix {
                    data: state.as_mut_ptr().cast(),
                    dtype: DType::F64,
                    row_stride: self.f(),
                },
                token_count: Some(count),
                accumulate: from > 0,
                workspace: Workspace { data: space.as_mut_ptr().cast(), size },
            };
            // SAFETY: every pointer is that of a vector of the size that the call needs.
            unsafe { stats.update(&call, Stream::NULL) }.unwrap();
        }
    }

    /// The same bits on every instruction set, with any threads, however tokens are cut.
    #[test]
    fn every_instruction_set_gives_the_same_sums() {
        let mut random = Random::fresh();
        for shape in [[1, 1, 3], [97, 257, 20], [200, 300, 65], [130, 2100, 17], [5, 16, 600]] {
            let p = Problem::random(&mut random, shape);
            let mut all: Vec<(Isa, Vec<u64>)> = Vec::new();
            for (i, isa) in Isa::available().into_iter().enumerate() {
                let stats = p.stats(1 + i, isa);
                let mut state = vec![f64::NAN; rows::WITH_BASE * p.f()];
                let mut count = f64::NAN;
                let cut = if i == 0 { 0 } else { random.below(shape[0]) };
                if cut > 0 {
                    p.update(&stats, &mut state, &mut count, 0, cut);
                }
                p.update(&stats, &mut state, &mut count, cut, shape[0]);
                let bits = state.iter().chain([&count]).map(|x| x.to_bits()).collect();
                all.push((isa, bits));
            }
            assert!(all[0].1.iter().any(|bits| *bits != 0));
            for (isa, bits) in &all {
                assert!(*bits == all[0].1, "{isa:?}: {shape:?} {:?}", p.rows.norm);
            }
        }
    }
}
