//! dH of a slab of tokens: for each strip of inputs that fits the registers, the rows of the
//! latents that are active, in ascending order, one fused multiply-add each.
//!
//! One accumulator per element starts at zero and skips inactive latents, whatever the strip or
//! block: so the bits depend on the token's coefficients alone.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::lanes::{Element, LANES, Lanes, Line, Work};
use super::pack::{PANEL, Panels};

/// Latents whose strip stays in the first-level cache while the slab passes over it.
const BLOCK: usize = 6 * PANEL;
/// The widest strip, in lines.
const WIDTH: usize = 16;
/// Tokens of a slab.
pub(super) const SLAB: usize = 48;

/// How rows are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    Store,
    /// Past the caches: rows are aligned to lines, and nobody reads them soon.
    Stream,
    /// old + new, rounded once; rows without active latents are not touched.
    Add,
}

/// dH of up to SLAB tokens.
pub(super) struct Gradient<'a> {
    pub panels: Panels<'a>,
    pub d_in: usize,
    /// K
    pub count: usize,
    /// Multiplies every coefficient.
    pub factor: f32,
    pub write: Write,
}

impl Gradient<'_> {
    /// # Safety
    /// The machine must have the lanes' instructions; `coef` points to rows of K numbers and `out`
    /// to as many rows of d_in elements, aligned to lines for [`Write::Stream`].
    pub unsafe fn run<L: Lanes, E: Element>(&self, coef: &[*const f32], out: &[*mut u8]) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.write != Write::Add {
                return self.strips::<L, E>(coef, out);
            }
            let (mut active_coef, mut active_out) =
                ([std::ptr::null(); SLAB], [std::ptr::null_mut(); SLAB]);
            let mut n = 0;
            for (coef, out) in coef.iter().zip(out) {
                (active_coef[n], active_out[n]) = (*coef, *out);
                n += std::slice::from_raw_parts(*coef, self.count).iter().any(|c| *c != 0.0)
                    as usize;
            }
            self.strips::<L, E>(&active_coef[..n], &active_out[..n])
        }
    }

    unsafe fn strips<L: Lanes, E: Element>(&self, coef: &[*const f32], out: &[*mut u8]) {
        let mut sums = [const { MaybeUninit::<Line>::uninit() }; SLAB * WIDTH];
        let mut step = 0;
        while step < self.panels.steps {
            let width = (1 << (self.panels.steps - step).ilog2()).min(L::WIDTH);
            for k in (0..self.count).step_by(BLOCK) {
                let strip = Strip {
                    coef,
                    out,
                    factor: self.factor,
                    write: self.write,
                    weights: self.panels.row(k, step),
                    panel: self.panels.panel(),
                    k,
                    latents: BLOCK.min(self.count - k),
                    start: step * LANES,
                    inputs: (self.d_in - step * LANES).min(width * LANES),
                    sums: sums.as_mut_ptr().cast(),
                    first: k == 0,
                    last: k + BLOCK >= self.count,
                };
                // SAFETY: the caller's promise; the strip's weights are inside the panels.
                unsafe {
                    match width {
                        16 => L::enter(Kernel::<L, E, 16>(strip, PhantomData)),
                        8 => L::enter(Kernel::<L, E, 8>(strip, PhantomData)),
                        4 => L::enter(Kernel::<L, E, 4>(strip, PhantomData)),
                        2 => L::enter(Kernel::<L, E, 2>(strip, PhantomData)),
                        _ => L::enter(Kernel::<L, E, 1>(strip, PhantomData)),
                    }
                }
            }
            step += width;
        }
    }
}

/// A strip of inputs × a block of latents, for all tokens.
struct Strip<'a> {
    coef: &'a [*const f32],
    out: &'a [*mut u8],
    factor: f32,
    write: Write,
    weights: *const Line,
    /// Lines from panel to panel.
    panel: usize,
    k: usize,
    latents: usize,
    start: usize,
    inputs: usize,
    /// What earlier blocks summed.
    sums: *mut Line,
    first: bool,
    last: bool,
}

/// A strip of W lines.
struct Kernel<'a, L, E, const W: usize>(Strip<'a>, PhantomData<(L, E)>);

impl<L: Lanes, E: Element, const W: usize> Work for Kernel<'_, L, E, W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run(self) {
        let s = self.0;
        // SAFETY: the caller's promise: coefficients k.. of each token, W lines of packed weights
        // of each latent, room for W sums of each token, `inputs` elements of each output row.
        unsafe {
            let factor = L::splat(s.factor);
            for (t, (coef, out)) in s.coef.iter().zip(s.out).enumerate() {
                let coef = coef.add(s.k);
                let mut active = L::nonzero(coef, s.latents.min(LANES));
                if s.latents > LANES {
                    active |= L::nonzero(coef.add(LANES), s.latents - LANES) << LANES;
                }
                if active == 0 && !s.first && !s.last {
                    continue;
                }
                let sums = s.sums.add(t * WIDTH);
                let mut sum = [L::zero(); W];
                if !s.first {
                    for (i, sum) in sum.iter_mut().enumerate() {
                        *sum = L::load(sums.add(i).cast());
                    }
                }
                while active != 0 {
                    let k = active.trailing_zeros() as usize;
                    active &= active - 1;
                    let c = L::mul(factor, L::splat(*coef.add(k)));
                    let row = s.weights.add(k / PANEL * s.panel + k % PANEL);
                    for (i, sum) in sum.iter_mut().enumerate() {
                        *sum = L::fma(c, L::load(row.add(i * PANEL).cast()), *sum);
                    }
                }
                let out = out.add(s.start * E::BYTES);
                for (i, sum) in sum.iter().enumerate() {
                    if s.last {
                        put::<L, E>(&s, out, i, *sum);
                    } else {
                        L::store(sums.add(i).cast(), *sum);
                    }
                }
            }
        }
    }
}

/// Writes line i of a strip, which may end inside it.
#[inline(always)]
unsafe fn put<L: Lanes, E: Element>(s: &Strip<'_>, out: *mut u8, i: usize, sum: L::V) {
    let left = s.inputs - i * LANES;
    // SAFETY: the caller's promise: `left` elements may be written, all of them may be read.
    unsafe {
        let out = out.add(i * LANES * E::BYTES);
        if left >= LANES {
            match s.write {
                Write::Store => E::store::<L>(out, sum),
                Write::Stream => E::stream::<L>(out, sum),
                Write::Add => E::store::<L>(out, L::add(E::load::<L>(out), sum)),
            }
        } else {
            let mut tail = Line([0.0; LANES]);
            let tail = (&raw mut tail).cast::<u8>();
            if s.write == Write::Add {
                out.copy_to_nonoverlapping(tail, left * E::BYTES);
                E::store::<L>(tail, L::add(E::load::<L>(tail), sum));
            } else {
                E::store::<L>(tail, sum);
            }
            tail.copy_to_nonoverlapping(out, left * E::BYTES);
        }
    }
}
