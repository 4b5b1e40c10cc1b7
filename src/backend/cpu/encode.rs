//! weight · hidden for a slab of tokens: register tiles of tokens × latents that stream both from
//! the second-level cache.
//!
//! One accumulator register per (token, latent) takes the inputs in ascending order, whatever the
//! tile, chunk or group: so the bits depend on the two rows alone.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::lanes::{Bf16Dot, Element, F32, LANES, Lanes, Line, Work, methods};
use super::pack::{PANEL, Panels};

/// Steps of a chunk: six rows and a tile's weights share the 32 KiB cache.
const CHUNK: usize = 32;
/// Lines from one converted row to the next: not a power of two, so that they share no cache set.
const CONVERTED: usize = CHUNK + 5;
/// Tokens of the largest tile.
const TOKENS: usize = 6;
/// Latents that one pass over the slab takes, at most.
const GROUP: usize = 32;
/// Bytes of weights that stay in the second-level cache during a pass.
const GROUP_BYTES: usize = 512 << 10;

/// How hidden states are multiplied: one step takes `INPUTS` elements of a row, a part of them in each
/// pass.
pub(super) trait Product: Copy {
    type L: Lanes;
    type Sum: Copy;
    type Hidden: Copy;
    type Weight: Copy;
    const INPUTS: usize;
    /// Lines of weights in one step.
    const TERMS: usize;
    /// Passes over a chunk, each with a part of the lanes: the tile's sums fit the registers.
    const PASSES: usize;

    unsafe fn enter<W: Work>(work: W) -> W::Out;
    unsafe fn zero() -> Self::Sum;
    /// A pass' part of a line of sums.
    unsafe fn load(line: *const f32, pass: usize) -> Self::Sum;
    unsafe fn store(line: *mut f32, pass: usize, sum: Self::Sum);
    /// A pass' part of one line of hidden states.
    unsafe fn hidden(line: *const u8, pass: usize) -> Self::Hidden;
    unsafe fn weight(lines: *const Line, pass: usize) -> Self::Weight;
    unsafe fn accumulate(sum: Self::Sum, h: Self::Hidden, w: Self::Weight) -> Self::Sum;
}

/// f32 times f32.
#[derive(Clone, Copy)]
pub(super) struct Canonical<L>(PhantomData<L>);

impl<L: Lanes> Product for Canonical<L> {
    type L = L;
    type Sum = L::Part;
    type Hidden = L::Part;
    type Weight = L::Part;
    const INPUTS: usize = LANES;
    const TERMS: usize = 1;
    const PASSES: usize = L::PARTS;

    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::enter(work) }
    }

    methods! {
        fn zero() -> L::Part { L::zero_part() }
        fn load(line: *const f32, pass: usize) -> L::Part { L::load_part(line, pass) }
        fn store(line: *mut f32, pass: usize, sum: L::Part) { L::store_part(line, pass, sum) }
        fn hidden(line: *const u8, pass: usize) -> L::Part { L::load_part(line.cast(), pass) }
        fn weight(line: *const Line, pass: usize) -> L::Part { L::load_part(line.cast(), pass) }
        fn accumulate(sum: L::Part, h: L::Part, w: L::Part) -> L::Part { L::fma_part(h, w, sum) }
    }
}

/// bf16 hidden states as they are, against weights in two bf16 terms.
#[derive(Clone, Copy)]
pub(super) struct Split<L>(PhantomData<L>);

impl<L: Bf16Dot> Product for Split<L> {
    type L = L;
    type Sum = L::V;
    type Hidden = L::Pairs;
    type Weight = [L::Pairs; 2];
    const INPUTS: usize = 2 * LANES;
    const TERMS: usize = 2;
    const PASSES: usize = 1;

    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::enter_bf16(work) }
    }

    methods! {
        fn zero() -> L::V { L::zero() }
        fn load(line: *const f32, _pass: usize) -> L::V { L::load(line) }
        fn store(line: *mut f32, _pass: usize, sum: L::V) { L::store(line, sum) }
        fn hidden(line: *const u8, _pass: usize) -> L::Pairs { L::load_pairs(line) }
        /// The low term follows the high one.
        fn weight(line: *const Line, _pass: usize) -> [L::Pairs; 2] {
            [L::load_pairs(line.cast()), L::load_pairs(line.add(1).cast())]
        }
        fn accumulate(sum: L::V, h: L::Pairs, w: [L::Pairs; 2]) -> L::V {
            L::dot(L::dot(sum, h, w[0]), h, w[1])
        }
    }
}

/// Where a tile finds its hidden states.
pub(super) trait Source {
    type P: Product;
    /// Bytes of an element in the caller's rows.
    const BYTES: usize;
    /// Whether chunks of E are converted to f32 first.
    const CONVERT: bool;
    /// Whether f32 is copied all the same where latents take more than one pass: six of the caller's rows
    /// may fall on the same sets of the first-level cache, and a narrow tile reads them often.
    const COPY: bool;
    type E: Element;
}

/// In the caller's rows.
pub(super) struct Direct<P>(PhantomData<P>);

impl<P: Product> Source for Direct<P> {
    type P = P;
    type E = F32;
    const BYTES: usize = size_of::<Line>() / P::INPUTS;
    const CONVERT: bool = false;
    const COPY: bool = false;
}

/// In rows of f32 that the caller's are converted to, which is exact.
pub(super) struct Converted<L, E>(PhantomData<(L, E)>);

impl<L: Lanes, E: Element> Source for Converted<L, E> {
    type P = Canonical<L>;
    type E = E;
    const BYTES: usize = E::BYTES;
    const CONVERT: bool = E::BYTES != F32::BYTES;
    const COPY: bool = L::PARTS > 1;
}

/// Writes weight[k] · hidden[t] for k < `count` to out[t][k].
///
/// # Safety
/// The machine must have the product's instructions; every row must hold d_in elements, and every
/// output `count` numbers.
pub(super) unsafe fn dots<S: Source>(
    panels: &Panels<'_>,
    d_in: usize,
    count: usize,
    hidden: &[*const u8],
    out: &[*mut f32],
) {
    let group = group_size(panels, count);
    let most = <S::P as Product>::L::TOKENS;
    for k in (0..count).step_by(group) {
        for start in (0..hidden.len()).step_by(most) {
            let tokens = start..hidden.len().min(start + most);
            let pass = Pass {
                panels,
                d_in,
                latents: k..count.min(k + group),
                hidden: &hidden[tokens.clone()],
                out: &out[tokens],
                converts: S::CONVERT || (S::COPY && count > group),
            };
            // SAFETY: the caller's promise.
            unsafe { pass.run::<S>() }
        }
    }
}

/// Latents of a pass: whole panels, about equally many in each, within the caches' room.
fn group_size(panels: &Panels<'_>, count: usize) -> usize {
    let panel_bytes = panels.steps * panels.step() * size_of::<Line>();
    let most = (GROUP_BYTES / panel_bytes * PANEL).clamp(PANEL, GROUP);
    count.div_ceil(count.div_ceil(most)).next_multiple_of(PANEL)
}

/// All inputs of one tile of tokens against a group of latents.
struct Pass<'a> {
    panels: &'a Panels<'a>,
    d_in: usize,
    latents: Range<usize>,
    hidden: &'a [*const u8],
    out: &'a [*mut f32],
    /// Whether tiles read copies of the rows in f32.
    converts: bool,
}

impl Pass<'_> {
    unsafe fn run<S: Source>(&self) {
        let mut sums = [const { MaybeUninit::<Line>::uninit() }; GROUP * TOKENS];
        let mut converted = [const { MaybeUninit::<Line>::uninit() }; CONVERTED * TOKENS];
        let converted = converted.as_mut_ptr().cast::<Line>();
        let steps = self.panels.steps;
        for start in (0..steps).step_by(CHUNK) {
            let end = steps.min(start + CHUNK);
            let at = start * <S::P>::INPUTS;
            let chunk = Chunk {
                hidden: self.hidden,
                at: at * S::BYTES,
                // The last step may end inside a register.
                inputs: self.d_in.min(end * <S::P>::INPUTS) - at,
            };
            let mut rows = [std::ptr::null(); TOKENS];
            for (m, (row, hidden)) in rows.iter_mut().zip(self.hidden).enumerate() {
                *row = match self.converts {
                    true => converted.wrapping_add(m * CONVERTED).cast(),
                    false => hidden.wrapping_add(chunk.at),
                };
            }
            if self.converts {
                let work = Convert::<S>(chunk, converted, PhantomData);
                // SAFETY: the caller's promise; there is room for TOKENS × CHUNK lines.
                unsafe { <S::P>::enter(work) }
            }
            for k in self.latents.clone().step_by(<S::P as Product>::L::LATENTS) {
                let tile = Tile {
                    hidden: &rows[..self.hidden.len()],
                    inputs: chunk.inputs,
                    weights: self.panels.row(k, start),
                    sums: sums[(k - self.latents.start) * TOKENS..].as_mut_ptr().cast(),
                    first: start == 0,
                    out: (end == steps).then_some((self.out, k)),
                };
                // SAFETY: the caller's promise; the scratch has room for TOKENS × LATENTS sums, and
                // the tile's weights are inside the panels.
                unsafe { tile.dispatch::<S::P>(self.latents.end - k) }
            }
        }
    }
}

/// A chunk of inputs of every row.
#[derive(Clone, Copy)]
struct Chunk<'a> {
    hidden: &'a [*const u8],
    /// Where it begins, in bytes.
    at: usize,
    inputs: usize,
}

/// Converts a chunk to f32.
struct Convert<'a, S>(Chunk<'a>, *mut Line, PhantomData<S>);

impl<S: Source> Work for Convert<'_, S> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let Convert(chunk, lines, _) = self;
        for (m, row) in chunk.hidden.iter().enumerate() {
            // SAFETY: the caller's promise: `inputs` elements from `at` on, CHUNK lines per row.
            unsafe {
                let (row, line) = (row.add(chunk.at), lines.add(m * CONVERTED));
                let (whole, rest) = (chunk.inputs / LANES, chunk.inputs % LANES);
                for s in 0..whole {
                    let h = S::E::load::<<S::P as Product>::L>(row.add(s * LANES * S::BYTES));
                    <S::P as Product>::L::store(line.add(s).cast(), h);
                }
                if rest > 0 {
                    let row = row.add(whole * LANES * S::BYTES);
                    let h = S::E::load_end::<<S::P as Product>::L>(row, rest);
                    <S::P as Product>::L::store(line.add(whole).cast(), h);
                }
            }
        }
    }
}

/// A chunk of inputs of a tile of tokens × latents.
#[derive(Clone, Copy)]
struct Tile<'a> {
    hidden: &'a [*const u8],
    inputs: usize,
    weights: *const Line,
    /// Between chunks: [latent][TOKENS].
    sums: *mut Line,
    first: bool,
    /// After the last chunk: the tokens' outputs, and the first latent.
    out: Option<(&'a [*mut f32], usize)>,
}

impl Tile<'_> {
    /// Enters the kernel that was compiled for this many tokens and latents.
    unsafe fn dispatch<P: Product>(self, latents: usize) {
        macro_rules! kernels {
            ($($m:literal: $($n:literal)*),*) => {
                match (self.hidden.len(), latents.min(P::L::LATENTS)) {
                    $($(($m, $n) if $m <= P::L::TOKENS && $n <= P::L::LATENTS => {
                        // SAFETY: the caller's promise.
                        unsafe { P::enter(Kernel::<P, $m, $n>(self, PhantomData)) }
                    })*)*
                    (m, n) => unreachable!("no tile of {m} × {n}"),
                }
            };
        }
        kernels!(1: 1 2 3 4, 2: 1 2 3 4, 3: 1 2 3 4, 4: 1 2 3 4, 5: 1 2 3 4, 6: 1 2 3 4)
    }
}

/// A tile of M tokens × N latents.
struct Kernel<'a, P, const M: usize, const N: usize>(Tile<'a>, PhantomData<P>);

impl<P: Product, const M: usize, const N: usize> Work for Kernel<'_, P, M, N> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let t = self.0;
        let whole = t.inputs / P::INPUTS;
        // Zeros follow the end of a row.
        let mut ends = [Line([0.0; LANES]); M];
        let has_end = whole * P::INPUTS < t.inputs;
        // SAFETY: the caller's promise: M rows of `inputs` elements, N packed rows, room for M × N
        // sums, M outputs of k + N.
        unsafe {
            let mut rows = [std::ptr::null(); M];
            rows.copy_from_slice(&t.hidden[..M]);
            let mut end_rows = rows;
            if has_end {
                let bytes = (t.inputs - whole * P::INPUTS) * (size_of::<Line>() / P::INPUTS);
                for (end, row) in ends.iter_mut().zip(&mut end_rows) {
                    let from = row.add(whole * size_of::<Line>());
                    *row = (&raw const *end).cast();
                    from.copy_to_nonoverlapping((&raw mut *end).cast(), bytes);
                }
            }
            for pass in 0..P::PASSES {
                let mut sums = [[P::zero(); N]; M];
                if !t.first {
                    for (m, sums) in sums.iter_mut().enumerate() {
                        for (n, sum) in sums.iter_mut().enumerate() {
                            *sum = P::load(t.sums.add(n * TOKENS + m).cast(), pass);
                        }
                    }
                }
                for s in 0..whole {
                    let weights = t.weights.add(s * PANEL * P::TERMS);
                    step::<P, M, N>(&mut sums, &rows, s * size_of::<Line>(), weights, pass);
                }
                if has_end {
                    let weights = t.weights.add(whole * PANEL * P::TERMS);
                    step::<P, M, N>(&mut sums, &end_rows, 0, weights, pass);
                }
                for (m, sums) in sums.iter().enumerate() {
                    for (n, sum) in sums.iter().enumerate() {
                        P::store(t.sums.add(n * TOKENS + m).cast(), pass, *sum);
                    }
                }
            }
            let Some((out, k)) = t.out else { return };
            for (m, out) in out[..M].iter().enumerate() {
                for n in 0..N {
                    *out.add(k + n) = P::L::sum(P::L::load(t.sums.add(n * TOKENS + m).cast()));
                }
            }
        }
    }
}

/// One line of every row, or a pass' part of it.
#[inline(always)]
unsafe fn step<P: Product, const M: usize, const N: usize>(
    sums: &mut [[P::Sum; N]; M],
    rows: &[*const u8; M],
    at: usize,
    weights: *const Line,
    pass: usize,
) {
    // SAFETY: the caller's promise: a line of each row at this byte, and of N packed rows.
    unsafe {
        let mut w = [P::weight(weights, pass); N];
        for (n, w) in w.iter_mut().enumerate() {
            *w = P::weight(weights.add(n * P::TERMS), pass);
        }
        for (sums, row) in sums.iter_mut().zip(rows) {
            let h = P::hidden(row.add(at), pass);
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = P::accumulate(*sum, h, w);
            }
        }
    }
}
