//! dH of a slab of tokens: for each strip of inputs that fits the registers, the rows of the
//! latents that are active, in ascending order, one fused multiply-add each.
//!
//! Where tokens are normalised, a latent's dot product is a · (W · h), and dH has a second part:
//!
//! ```text
//! dH = factor · (a Σ_k coef_k W_k − q (Σ_k coef_k dot_k) (h − mean))
//! ```
//!
//! One accumulator per element starts at zero and skips inactive latents, whatever the strip or
//! block: so the bits depend on the token's coefficients alone.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::lanes::{Element, LANES, Lanes, Line, Work, prefetch, with_element};
use super::pack::{PANEL, Panels};
use crate::tensor::DType;

/// Bytes of a strip of latents that stay in the first-level cache while the slab passes over them.
const BLOCK_BYTES: usize = 24 << 10;
/// Weights of this many bytes and more are far away when the next slab needs them.
const LARGE_BYTES: usize = 512 << 10;
/// The widest strip, in lines.
const WIDTH: usize = 16;
/// Tokens of a slab.
pub(super) const SLAB: usize = 48;

/// Repeats a statement for each line of a strip. Unrolled by hand: a loop that the compiler leaves
/// rolled keeps the sums in memory.
macro_rules! lines {
    ($i:ident < $w:ident => $body:expr) => {
        lines!($i < $w => $body; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($i:ident < $w:ident => $body:expr; $($n:literal)*) => {{
        $(if $n < $w {
            let $i = $n;
            $body;
        })*
    }};
}

/// How rows are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    Store,
    /// Past the caches: rows are aligned to lines, and nobody reads them soon.
    Stream,
    /// old + new, rounded once; rows without active latents are not touched.
    Add,
}

/// What the norm of a token adds to its dH.
#[derive(Clone, Copy)]
pub(super) struct Normed {
    /// a
    pub scale: f32,
    pub mean: f32,
    /// q Σ_k coef_k dot_k
    pub pull: f64,
    pub hidden: *const u8,
    pub dtype: DType,
}

impl Normed {
    /// h − mean of a line of inputs.
    #[inline(always)]
    unsafe fn line<L: Lanes>(&self, start: usize) -> L::V {
        // SAFETY: the caller's promise: the line lies within the row.
        unsafe {
            let hidden = with_element!(self.dtype, H => {
                H::load::<L>(self.hidden.add(start * H::BYTES))
            });
            L::add(hidden, L::splat(-self.mean))
        }
    }

    /// The same of fewer inputs; what follows them is not written.
    #[inline(always)]
    unsafe fn part<L: Lanes>(&self, start: usize, inputs: usize) -> L::V {
        // SAFETY: the caller's promise: so many inputs lie within the row.
        unsafe {
            let hidden = with_element!(self.dtype, H => {
                H::load_end::<L>(self.hidden.add(start * H::BYTES), inputs)
            });
            L::add(hidden, L::splat(-self.mean))
        }
    }
}

/// dH of up to SLAB tokens.
pub(super) struct Gradient<'a> {
    pub panels: Panels<'a>,
    pub d_in: usize,
    /// Rows of all latents.
    pub count: usize,
    /// Multiplies every coefficient.
    pub factor: f32,
    pub write: Write,
}

impl Gradient<'_> {
    /// # Safety
    /// The machine must have the lanes' instructions; `coef` points to rows of `count` numbers and `out`
    /// to as many rows of d_in elements, aligned to lines for [`Write::Stream`]. `normed` is empty
    /// or has each row's own.
    pub unsafe fn run<L: Lanes, E: Element>(
        &self,
        coef: &[*const f32],
        normed: &[Normed],
        out: &[*mut u8],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.write != Write::Add {
                return self.strips::<L, E>(coef, normed, out);
            }
            let (mut active_coef, mut active_out) =
                ([std::ptr::null(); SLAB], [std::ptr::null_mut(); SLAB]);
            let mut active_normed = [const { MaybeUninit::<Normed>::uninit() }; SLAB];
            let mut n = 0;
            for (i, (coef, out)) in coef.iter().zip(out).enumerate() {
                (active_coef[n], active_out[n]) = (*coef, *out);
                if let Some(normed) = normed.get(i) {
                    active_normed[n].write(*normed);
                }
                n += std::slice::from_raw_parts(*coef, self.count).iter().any(|c| *c != 0.0)
                    as usize;
            }
            let normed_len = if normed.is_empty() { 0 } else { n };
            let active_normed =
                std::slice::from_raw_parts(active_normed.as_ptr().cast(), normed_len);
            self.strips::<L, E>(&active_coef[..n], active_normed, &active_out[..n])
        }
    }

    unsafe fn strips<L: Lanes, E: Element>(
        &self,
        coef: &[*const f32],
        normed: &[Normed],
        out: &[*mut u8],
    ) {
        let mut sums = [const { MaybeUninit::<Line>::uninit() }; SLAB * WIDTH];
        let (mut step, whole) = (0, self.d_in / LANES);
        // What stays in the second-level cache from slab to slab need not be asked for.
        let large = self.count * self.d_in * size_of::<f32>() > LARGE_BYTES;
        // A bit of `active` for each latent.
        let block = (BLOCK_BYTES / (L::WIDTH * size_of::<Line>())).min(u64::BITS as usize);
        while step < self.panels.steps {
            // The line in which a row ends is a strip of its own.
            let width = match whole - step {
                0 => 1,
                left => (1 << left.ilog2()).min(L::WIDTH),
            };
            for k in (0..self.count).step_by(block) {
                let (next_k, next_step) =
                    if k + block < self.count { (k + block, step) } else { (0, step + width) };
                let next = (large && next_step < self.panels.steps).then(|| Next {
                    weights: self.panels.row(next_k, next_step),
                    panels: block.min(self.count - next_k).div_ceil(PANEL),
                    lines: width.min(self.panels.steps - next_step) * PANEL,
                });
                let strip = Strip {
                    next,
                    coef,
                    normed,
                    out,
                    factor: self.factor,
                    write: self.write,
                    weights: self.panels.row(k, step),
                    panel: self.panels.panel(),
                    k,
                    latents: block.min(self.count - k),
                    start: step * LANES,
                    inputs: (self.d_in - step * LANES).min(width * LANES),
                    sums: sums.as_mut_ptr().cast(),
                    first: k == 0,
                    last: k + block >= self.count,
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

/// The weights of the block that comes next. Between panels they are far apart, so that no machine
/// foresees them.
struct Next {
    weights: *const Line,
    panels: usize,
    /// Of each panel.
    lines: usize,
}

impl Next {
    /// Asks for part `i` of `parts`.
    #[inline(always)]
    fn prefetch(&self, i: usize, parts: usize, panel: usize) {
        let all = self.panels * self.lines;
        for line in i * all / parts..(i + 1) * all / parts {
            prefetch(self.weights.wrapping_add(line / self.lines * panel + line % self.lines));
        }
    }
}

/// A strip of inputs × a block of latents, for all tokens.
struct Strip<'a> {
    next: Option<Next>,
    coef: &'a [*const f32],
    normed: &'a [Normed],
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
            for (t, (coef, out)) in s.coef.iter().zip(s.out).enumerate() {
                if let Some(next) = &s.next {
                    next.prefetch(t, s.coef.len(), s.panel);
                }
                let normed = s.normed.get(t);
                let factor = L::splat(s.factor * normed.map_or(1.0, |normed| normed.scale));
                let coef = coef.add(s.k);
                let mut active = 0;
                for k in (0..s.latents).step_by(LANES) {
                    active |= (L::nonzero(coef.add(k), LANES.min(s.latents - k)) as u64) << k;
                }
                if active == 0 && !s.first && !s.last {
                    continue;
                }
                let sums = s.sums.add(t * WIDTH);
                let mut sum = [L::zero(); W];
                if !s.first {
                    lines!(i < W => sum[i] = L::load(sums.add(i).cast()));
                }
                while active != 0 {
                    let k = active.trailing_zeros() as usize;
                    active &= active - 1;
                    let c = L::mul(factor, L::splat(*coef.add(k)));
                    let row = s.weights.add(k / PANEL * s.panel + k % PANEL);
                    lines!(i < W => sum[i] = L::fma(c, L::load(row.add(i * PANEL).cast()), sum[i]));
                }
                if !s.last {
                    lines!(i < W => L::store(sums.add(i).cast(), sum[i]));
                    continue;
                }
                // Without violations there is nothing to pull, whatever h is.
                if let Some(normed) = normed.filter(|normed| normed.pull != 0.0) {
                    let pull = L::splat((-(s.factor as f64) * normed.pull) as f32);
                    if s.inputs < LANES {
                        sum[0] = L::fma(pull, normed.part::<L>(s.start, s.inputs), sum[0]);
                    } else {
                        lines!(i < W => {
                            sum[i] = L::fma(pull, normed.line::<L>(s.start + i * LANES), sum[i]);
                        });
                    }
                }
                if s.inputs < LANES {
                    put_part::<L, E>(&s, out.add(s.start * E::BYTES), sum[0]);
                } else {
                    put::<L, E, W>(s.write, out.add(s.start * E::BYTES), &sum);
                }
            }
        }
    }
}

/// Writes a strip of whole lines.
#[inline(always)]
unsafe fn put<L: Lanes, E: Element, const W: usize>(write: Write, out: *mut u8, sum: &[L::V; W]) {
    let line = LANES * E::BYTES;
    // SAFETY: the caller's promise: W lines may be written, and read to add to them.
    unsafe {
        match write {
            Write::Store => lines!(i < W => E::store::<L>(out.add(i * line), sum[i])),
            Write::Stream => lines!(i < W => E::stream::<L>(out.add(i * line), sum[i])),
            Write::Add => lines!(i < W => {
                let out = out.add(i * line);
                E::store::<L>(out, L::add(E::load::<L>(out), sum[i]));
            }),
        }
    }
}

/// Writes the line in which a row ends.
#[inline(always)]
unsafe fn put_part<L: Lanes, E: Element>(s: &Strip<'_>, out: *mut u8, sum: L::V) {
    let mut line = Line([0.0; LANES]);
    let line = (&raw mut line).cast::<u8>();
    // SAFETY: the caller's promise: `inputs` elements may be written, and read to add to them.
    unsafe {
        if s.write == Write::Add {
            out.copy_to_nonoverlapping(line, s.inputs * E::BYTES);
            E::store::<L>(line, L::add(E::load::<L>(line), sum));
        } else {
            E::store::<L>(line, sum);
        }
        line.copy_to_nonoverlapping(out, s.inputs * E::BYTES);
    }
}
