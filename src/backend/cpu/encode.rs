//! weight · hidden for a slab of tokens: register tiles of tokens × latents, with hidden states
//! converted once per chunk into a panel of the first-level cache.
//!
//! One accumulator register per (token, latent) takes the inputs in ascending order, whatever the
//! tile, chunk or group: so the bits depend on the two rows alone.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::lanes::{Bf16Dot, Element, LANES, Lanes, Line, Work, prefetch};
use super::pack::{PANEL, Panels};

/// Steps of a chunk: the panel of hidden states and a tile's weights share the 32 KiB cache.
const CHUNK: usize = 32;
/// Tokens of the largest tile.
const TOKENS: usize = 6;
/// Latents that one pass over the slab takes, at most.
const GROUP: usize = 64;
/// Bytes of weights that stay in the second-level cache during a pass.
const GROUP_BYTES: usize = 512 << 10;

/// How hidden states are read and multiplied: one step takes `INPUTS` elements into a register.
pub(super) trait Product: Copy {
    type L: Lanes;
    type Hidden: Copy;
    type Weight: Copy;
    const INPUTS: usize;
    /// Lines of weights in one step.
    const TERMS: usize;
    /// Bytes of one hidden element.
    const BYTES: usize;

    unsafe fn enter<W: Work>(work: W) -> W::Out;
    unsafe fn load(row: *const u8) -> Self::Hidden;
    unsafe fn save(panel: *mut Line, h: Self::Hidden);
    unsafe fn reload(panel: *const Line) -> Self::Hidden;
    unsafe fn weight(line: *const Line) -> Self::Weight;
    unsafe fn accumulate(
        sum: <Self::L as Lanes>::V,
        h: Self::Hidden,
        w: Self::Weight,
    ) -> <Self::L as Lanes>::V;
}

/// f32 products of hidden states converted to f32, which is exact.
#[derive(Clone, Copy)]
pub(super) struct Canonical<L, E>(PhantomData<(L, E)>);

impl<L: Lanes, E: Element> Product for Canonical<L, E> {
    type L = L;
    type Hidden = L::V;
    type Weight = L::V;
    const INPUTS: usize = LANES;
    const TERMS: usize = 1;
    const BYTES: usize = E::BYTES;

    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::enter(work) }
    }

    #[inline(always)]
    unsafe fn load(row: *const u8) -> L::V {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { E::load::<L>(row) }
    }

    #[inline(always)]
    unsafe fn save(panel: *mut Line, h: L::V) {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::store(panel.cast(), h) }
    }

    #[inline(always)]
    unsafe fn reload(panel: *const Line) -> L::V {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::load(panel.cast()) }
    }

    #[inline(always)]
    unsafe fn weight(line: *const Line) -> L::V {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::load(line.cast()) }
    }

    #[inline(always)]
    unsafe fn accumulate(sum: L::V, h: L::V, w: L::V) -> L::V {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::fma(h, w, sum) }
    }
}

/// bf16 hidden states as they are, against weights in two bf16 terms.
#[derive(Clone, Copy)]
pub(super) struct Split<L>(PhantomData<L>);

impl<L: Bf16Dot> Product for Split<L> {
    type L = L;
    type Hidden = L::Pairs;
    type Weight = [L::Pairs; 2];
    const INPUTS: usize = 2 * LANES;
    const TERMS: usize = 2;
    const BYTES: usize = 2;

    unsafe fn enter<W: Work>(work: W) -> W::Out {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::enter_bf16(work) }
    }

    #[inline(always)]
    unsafe fn load(row: *const u8) -> L::Pairs {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::load_pairs(row) }
    }

    #[inline(always)]
    unsafe fn save(panel: *mut Line, h: L::Pairs) {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::store_pairs(panel, h) }
    }

    #[inline(always)]
    unsafe fn reload(panel: *const Line) -> L::Pairs {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::load_pairs(panel.cast()) }
    }

    #[inline(always)]
    unsafe fn weight(line: *const Line) -> [L::Pairs; 2] {
        // SAFETY: the caller's promise to `Lanes`; the low term follows the high one.
        unsafe { [L::load_pairs(line.cast()), L::load_pairs(line.add(1).cast())] }
    }

    #[inline(always)]
    unsafe fn accumulate(sum: L::V, h: L::Pairs, w: [L::Pairs; 2]) -> L::V {
        // SAFETY: the caller's promise to `Lanes`.
        unsafe { L::dot(L::dot(sum, h, w[0]), h, w[1]) }
    }
}

/// Writes weight[k] · hidden[t] for k < `count` to out[t][k].
///
/// # Safety
/// The machine must have the product's instructions; every row must hold d_in elements, and every
/// output `count` numbers.
pub(super) unsafe fn dots<P: Product>(
    panels: &Panels<'_>,
    d_in: usize,
    count: usize,
    hidden: &[*const u8],
    out: &[*mut f32],
) {
    let group = group_size(panels, count);
    let tiles = hidden.len().div_ceil(P::L::TOKENS);
    for k in (0..count).step_by(group) {
        let latents = k..count.min(k + group);
        for tile in 0..tiles {
            let tokens = tile * P::L::TOKENS..hidden.len().min((tile + 1) * P::L::TOKENS);
            let next = hidden.get(tokens.end..).unwrap_or_default();
            let pass = Pass { panels, d_in, latents: latents.clone(), next };
            // SAFETY: the caller's promise.
            unsafe { pass.run::<P>(&hidden[tokens.clone()], &out[tokens]) }
        }
    }
}

/// Latents of a pass: whole panels, about equally many in each, within the caches' room.
fn group_size(panels: &Panels<'_>, count: usize) -> usize {
    let panel_bytes = panels.panel() * size_of::<Line>();
    let most = (GROUP_BYTES / panel_bytes.max(1) * PANEL).clamp(PANEL, GROUP);
    let groups = count.div_ceil(most).max(1);
    count.div_ceil(groups).next_multiple_of(PANEL)
}

/// All inputs of one tile of tokens against a group of latents.
struct Pass<'a> {
    panels: &'a Panels<'a>,
    d_in: usize,
    latents: std::ops::Range<usize>,
    /// The tokens after this tile, to be prefetched.
    next: &'a [*const u8],
}

impl Pass<'_> {
    unsafe fn run<P: Product>(&self, hidden: &[*const u8], out: &[*mut f32]) {
        let mut sums = [const { MaybeUninit::<Line>::uninit() }; GROUP * TOKENS];
        let mut panel = [const { MaybeUninit::<Line>::uninit() }; CHUNK * TOKENS];
        for start in (0..self.panels.steps).step_by(CHUNK) {
            let end = self.panels.steps.min(start + CHUNK);
            let ahead = self.ahead::<P>(hidden, end);
            for (i, k) in self.latents.clone().step_by(P::L::LATENTS).enumerate() {
                let latents = P::L::LATENTS.min(self.latents.end - k);
                let done = k - self.latents.start;
                let tile = Tile {
                    hidden,
                    out,
                    ahead: [ahead.get(2 * i), ahead.get(2 * i + 1)]
                        .map(|row| row.copied().flatten().unwrap_or(panel.as_ptr().cast())),
                    weights: self.panels.row(k, start),
                    sums: sums[done * TOKENS..].as_mut_ptr().cast(),
                    panel: panel.as_mut_ptr().cast(),
                    k,
                    start,
                    steps: end - start,
                    // The last step may end inside a register.
                    inputs: (self.d_in - start * P::INPUTS).min((end - start) * P::INPUTS),
                    first: start == 0,
                    last: end == self.panels.steps,
                };
                // SAFETY: the caller's promise; the tile's scratch has room for TOKENS × LATENTS
                // sums and TOKENS × CHUNK lines, and its weights are inside the panels.
                unsafe { tile.dispatch::<P>(latents, done == 0) }
            }
        }
    }

    /// Where the hidden states of the next chunk begin: this tile's, or the next one's.
    fn ahead<P: Product>(&self, hidden: &[*const u8], end: usize) -> [Option<*const u8>; TOKENS] {
        let (rows, at) = match end < self.panels.steps {
            true => (hidden, end * P::INPUTS * P::BYTES),
            false => (self.next, 0),
        };
        std::array::from_fn(|m| rows.get(m).map(|row| row.wrapping_add(at)))
    }
}

/// A chunk of inputs of a tile of tokens × latents.
#[derive(Clone, Copy)]
struct Tile<'a> {
    hidden: &'a [*const u8],
    out: &'a [*mut f32],
    /// Two rows whose next chunk is prefetched meanwhile.
    ahead: [*const u8; 2],
    weights: *const Line,
    sums: *mut Line,
    panel: *mut Line,
    k: usize,
    start: usize,
    steps: usize,
    inputs: usize,
    first: bool,
    last: bool,
}

impl Tile<'_> {
    /// Enters the kernel that was compiled for this many tokens and latents.
    unsafe fn dispatch<P: Product>(self, latents: usize, fresh: bool) {
        macro_rules! kernels {
            ($($m:literal: $($n:literal)*),*) => {
                match (self.hidden.len(), latents) {
                    // The first arm's condition keeps kernels that the lanes never use out.
                    $($(($m, $n) if $m <= P::L::TOKENS && $n <= P::L::LATENTS => {
                        // SAFETY: the caller's promise.
                        unsafe {
                            match fresh {
                                true => P::enter(Kernel::<P, $m, $n, true>(self, PhantomData)),
                                false => P::enter(Kernel::<P, $m, $n, false>(self, PhantomData)),
                            }
                        }
                    })*)*
                    _ => unreachable!("no tile of {} × {latents}", self.hidden.len()),
                }
            };
        }
        kernels!(1: 1 2 3 4, 2: 1 2 3 4, 3: 1 2 3 4, 4: 1 2 3 4, 5: 1 2 3 4, 6: 1 2 3 4)
    }
}

/// A tile of M tokens × N latents; FRESH reads the rows and fills the panel, else it reads that.
struct Kernel<'a, P, const M: usize, const N: usize, const FRESH: bool>(Tile<'a>, PhantomData<P>);

impl<P: Product, const M: usize, const N: usize, const FRESH: bool> Work
    for Kernel<'_, P, M, N, FRESH>
{
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let t = self.0;
        // SAFETY: the caller's promise: M rows with `inputs` elements from `start` on, N packed
        // rows of `steps` steps, room for M × N sums and M × steps lines, M outputs of k + N.
        unsafe {
            let mut sums = [[P::L::zero(); N]; M];
            if !t.first {
                for (m, sums) in sums.iter_mut().enumerate() {
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = P::L::load(t.sums.add(n * TOKENS + m).cast());
                    }
                }
            }
            // Steps that lie wholly inside the row.
            let whole = t.inputs / P::INPUTS;
            let mut rows = [std::ptr::null(); M];
            if FRESH {
                for (row, hidden) in rows.iter_mut().zip(t.hidden) {
                    *row = hidden.add(t.start * P::INPUTS * P::BYTES);
                }
                fill_tail::<P, M>(&t, &rows, whole);
                fill::<P, M>(&t, &rows, 0, whole);
            }
            for s in 0..t.steps {
                prefetch(t.ahead[0].wrapping_add(s * P::INPUTS * P::BYTES));
                prefetch(t.ahead[1].wrapping_add(s * P::INPUTS * P::BYTES));
                if FRESH {
                    // One step ahead: what is stored now is not loaded at once.
                    fill::<P, M>(&t, &rows, s + 1, whole);
                }
                step::<P, M, N>(&t, s, &mut sums);
            }
            for (m, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    match t.last {
                        true => *t.out.get_unchecked(m).add(t.k + n) = P::L::sum(*sum),
                        false => P::L::store(t.sums.add(n * TOKENS + m).cast(), *sum),
                    }
                }
            }
        }
    }
}

/// Converts step s of M rows into the panel, if the rows have it whole.
#[inline(always)]
unsafe fn fill<P: Product, const M: usize>(
    t: &Tile<'_>,
    rows: &[*const u8; M],
    s: usize,
    whole: usize,
) {
    if s < whole {
        let at = s * P::INPUTS * P::BYTES;
        for (m, row) in rows.iter().enumerate() {
            // SAFETY: the caller's promise: the rows hold `whole` steps from `start` on.
            unsafe {
                let h = P::load(row.add(at));
                P::save(t.panel.add(s * TOKENS + m), h);
            }
        }
    }
}

/// The step in which the rows end, if they end inside one: zeros follow.
#[inline(always)]
unsafe fn fill_tail<P: Product, const M: usize>(t: &Tile<'_>, rows: &[*const u8; M], whole: usize) {
    if whole < t.steps {
        let at = whole * P::INPUTS * P::BYTES;
        let bytes = (t.inputs - whole * P::INPUTS) * P::BYTES;
        for (m, row) in rows.iter().enumerate() {
            let mut tail = Line([0.0; LANES]);
            let tail = (&raw mut tail).cast::<u8>();
            // SAFETY: the caller's promise: the rows hold `inputs` elements from `start` on.
            unsafe {
                row.add(at).copy_to_nonoverlapping(tail, bytes);
                P::save(t.panel.add(whole * TOKENS + m), P::load(tail));
            }
        }
    }
}

/// One register of inputs of M tokens × N latents.
#[inline(always)]
unsafe fn step<P: Product, const M: usize, const N: usize>(
    t: &Tile<'_>,
    s: usize,
    sums: &mut [[<P::L as Lanes>::V; N]; M],
) {
    // SAFETY: the caller's promise: step s is within the packed rows and the panel.
    unsafe {
        let weights = t.weights.add(s * PANEL * P::TERMS);
        let mut w = [P::weight(weights); N];
        for (n, w) in w.iter_mut().enumerate() {
            *w = P::weight(weights.add(n * P::TERMS));
        }
        for (m, sums) in sums.iter_mut().enumerate() {
            let h = P::reload(t.panel.add(s * TOKENS + m));
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = P::accumulate(*sum, h, w);
            }
        }
    }
}
