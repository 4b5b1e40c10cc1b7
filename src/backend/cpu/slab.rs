//! The three run calls: tokens in blocks, blocks in slabs, a slab's dot products, formulas and
//! gradient while its rows are in cache.

use std::ops::Range;

use super::encode::{Converted, Direct, Split, dots};
use super::finish::{Coefficients, Latents};
use super::gradient::{Gradient, SLAB, Write};
use super::lanes::{Isa, Lanes, Line, with_element, with_lanes};
use super::pack::Panels;
use super::threads::Threads;
use crate::backend::{BackwardCall, EncodeCall, Grad, Matrix, PenaltyCall, Rows, Workspace};
use crate::tensor::DType;

/// dH of this many bytes and more is written past the caches.
const STREAM_BYTES: usize = 16 << 20;

/// Packed rows and everything else that does not change from call to call.
#[derive(Clone, Copy)]
pub(super) struct Kernels<'a> {
    pub isa: Isa,
    /// All but the weights.
    pub rows: Rows<'a>,
    pub panels: Panels<'a>,
    /// For the bf16 dot product, on machines that have it.
    pub bf16: Option<Panels<'a>>,
}

/// Tokens of a block, the unit of scheduling and of partial sums: a function of T alone, so that
/// sums do not depend on the threads.
fn block_size(tokens: usize) -> usize {
    const FEW: usize = 4 * SLAB;
    const BLOCKS: usize = 256;
    if tokens <= FEW { SLAB / 2 } else { tokens.div_ceil(BLOCKS).next_multiple_of(SLAB) }
}

fn block_count(tokens: usize) -> usize {
    tokens.div_ceil(block_size(tokens))
}

fn block(tokens: usize, index: usize) -> Range<usize> {
    let size = block_size(tokens);
    index * size..tokens.min((index + 1) * size)
}

/// The workspace of a penalty call: loss, count and per-latent losses of each block, then each
/// worker's coefficients of one slab.
#[derive(Clone, Copy)]
struct Scratch {
    partials: *mut f64,
    coef: *mut f32,
    count: usize,
}

// SAFETY: workers write disjoint parts: partials of their blocks, coefficients of their own.
unsafe impl Sync for Scratch {}

impl Scratch {
    fn partials_bytes(tokens: usize, count: usize) -> usize {
        (block_count(tokens) * (2 + count) * size_of::<f64>()).next_multiple_of(size_of::<Line>())
    }

    /// Floats of one token, from line to line.
    fn coef_stride(count: usize) -> usize {
        count.next_multiple_of(super::lanes::LANES)
    }

    fn bytes(tokens: usize, count: usize, workers: usize) -> usize {
        let workers = workers.min(block_count(tokens));
        let coef = workers * SLAB * Scratch::coef_stride(count) * size_of::<f32>();
        Scratch::partials_bytes(tokens, count) + coef
    }

    fn new(space: Workspace, tokens: usize, count: usize) -> Scratch {
        let coef = space.data.wrapping_add(Scratch::partials_bytes(tokens, count));
        Scratch { partials: space.data.cast(), coef: coef.cast(), count }
    }

    /// loss, count, then one loss per latent.
    unsafe fn block<'a>(&self, block: usize) -> &'a mut [f64] {
        let len = 2 + self.count;
        // SAFETY: the workspace has room for every block, and one worker at a time works on it.
        unsafe { std::slice::from_raw_parts_mut(self.partials.add(block * len), len) }
    }

    unsafe fn coef<'a>(&self, worker: usize, token: usize) -> &'a mut [f32] {
        let row = (worker * SLAB + token) * Scratch::coef_stride(self.count);
        // SAFETY: the workspace has room for a slab of every worker, who alone uses it.
        unsafe { std::slice::from_raw_parts_mut(self.coef.add(row), self.count) }
    }
}

/// A call that the workers share.
struct Shared<T>(T);

// SAFETY: the boundary checked that outputs overlap nothing, and workers write disjoint rows.
unsafe impl<T> Sync for Shared<T> {}

/// Up to SLAB rows, by address.
struct RowList<P> {
    rows: [P; SLAB],
    len: usize,
}

impl<P: Copy> RowList<P> {
    fn new(fill: P) -> RowList<P> {
        RowList { rows: [fill; SLAB], len: 0 }
    }

    fn push(&mut self, row: P) {
        self.rows[self.len] = row;
        self.len += 1;
    }

    fn get(&self) -> &[P] {
        &self.rows[..self.len]
    }
}

impl Kernels<'_> {
    /// Bytes of scratch of a penalty call.
    pub fn workspace_size(count: usize, tokens: usize, threads: usize) -> usize {
        Scratch::bytes(tokens, count, threads)
    }

    fn cost(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.rows.count()).saturating_mul(self.rows.d_in)
    }

    /// # Safety
    /// As [`super::Backend`].
    pub unsafe fn encode(&self, threads: &Threads, call: &EncodeCall) {
        let call = Shared(*call);
        threads.each(block_count(call.0.tokens), self.cost(call.0.tokens), |_, index| {
            let call = &call;
            // SAFETY: the caller's promise; every block has tokens of its own.
            unsafe { self.encode_block(&call.0, block(call.0.tokens, index)) }
        });
    }

    unsafe fn encode_block(&self, call: &EncodeCall, block: Range<usize>) {
        for start in block.clone().step_by(SLAB) {
            let (mut hidden, mut latents) =
                (RowList::new(std::ptr::null()), RowList::new(std::ptr::null_mut()));
            // SAFETY: the caller's promise: the slab's tokens exist.
            unsafe {
                for t in start..block.end.min(start + SLAB) {
                    hidden.push(call.hidden.row(t).cast_const());
                    latents.push(call.latents.row(t).cast::<f32>());
                }
                self.dots(call.hidden.dtype, hidden.get(), latents.get());
                for row in latents.get() {
                    let row = std::slice::from_raw_parts_mut(*row, self.rows.count());
                    with_lanes!(self.isa, L => L::enter(Latents { rows: &self.rows, row }));
                }
            }
        }
    }

    /// # Safety
    /// As [`super::Backend`].
    pub unsafe fn penalty(&self, threads: &Threads, call: &PenaltyCall) {
        let count = self.rows.count();
        let scratch = Scratch::new(call.workspace, call.tokens, count);
        let call = Shared(*call);
        // SAFETY: the caller's promise; every block has tokens and partial sums of its own, every
        // worker its slab of coefficients, and the sums are read when all is done.
        unsafe {
            let grad = call.0.grad.map(|grad| self.gradient(&grad, call.0.tokens));
            threads.each(block_count(call.0.tokens), self.cost(call.0.tokens), |worker, index| {
                let call = &call;
                self.penalty_block(&call.0, grad.as_ref(), &scratch, worker, index)
            });
            reduce(&call.0, &scratch)
        }
    }

    unsafe fn penalty_block(
        &self,
        call: &PenaltyCall,
        gradient: Option<&Gradient<'_>>,
        scratch: &Scratch,
        worker: usize,
        index: usize,
    ) {
        let block = block(call.tokens, index);
        // SAFETY: the caller's promise: the block's tokens exist, and nobody else works on them.
        unsafe {
            let sums = scratch.block(index);
            sums.fill(0.0);
            for start in block.clone().step_by(SLAB) {
                let slab = start..block.end.min(start + SLAB);
                self.penalty_slab(call, gradient, slab, |i| scratch.coef(worker, i), sums);
            }
        }
    }

    unsafe fn penalty_slab<'a>(
        &self,
        call: &PenaltyCall,
        gradient: Option<&Gradient<'_>>,
        slab: Range<usize>,
        coef: impl Fn(usize) -> &'a mut [f32],
        sums: &mut [f64],
    ) {
        let mut tokens = RowList::new((0, 0.0));
        let mut hidden = RowList::new(std::ptr::null());
        let mut dot = RowList::new(std::ptr::null_mut());
        // SAFETY: the caller's promise: the slab's tokens exist.
        unsafe {
            for t in slab {
                let mask = call.mask.map_or(1.0, |mask| mask.get(t));
                if mask == 0.0 {
                    self.leave_out(call, t);
                    continue;
                }
                dot.push(coef(tokens.len).as_mut_ptr());
                hidden.push(call.hidden.row(t).cast_const());
                tokens.push((t, mask));
            }
            self.dots(call.hidden.dtype, hidden.get(), dot.get());
            let [loss, count, latent_loss @ ..] = sums else { return };
            for (i, (t, mask)) in tokens.get().iter().enumerate() {
                let latent_loss = call.latent_loss.is_some().then_some(&mut *latent_loss);
                let reference = call.reference.row(*t).cast::<f32>().cast_const();
                let work = Coefficients {
                    rows: &self.rows,
                    row: coef(i),
                    reference,
                    mask: *mask,
                    latent_loss,
                };
                *loss += with_lanes!(self.isa, L => L::enter(work));
                *count += *mask as f64;
                if let Some(out) = &call.coef {
                    out.row(*t)
                        .cast::<f32>()
                        .copy_from_nonoverlapping(coef(i).as_ptr(), self.rows.count());
                }
            }
            if let (Some(gradient), Some(grad)) = (gradient, &call.grad) {
                let mut out = RowList::new(std::ptr::null_mut());
                tokens.get().iter().for_each(|(t, _)| out.push(grad.rows.row(*t)));
                let dot = dot.rows.map(|row| row.cast_const());
                self.gradient_rows(gradient, grad.rows.dtype, &dot[..out.len], out.get());
            }
        }
    }

    /// Zero coefficients and dH for a token that the mask leaves out.
    unsafe fn leave_out(&self, call: &PenaltyCall, t: usize) {
        let zero = |rows: &Matrix, len: usize| {
            // SAFETY: the caller's promise: row t exists, `len` elements long.
            unsafe { rows.row(t).write_bytes(0, len * rows.dtype.size()) }
        };
        if let Some(coef) = &call.coef {
            zero(coef, self.rows.count());
        }
        if let Some(grad) = call.grad.filter(|grad| !grad.accumulate) {
            zero(&grad.rows, self.rows.d_in);
        }
    }

    /// # Safety
    /// As [`super::Backend`].
    pub unsafe fn backward(&self, threads: &Threads, call: &BackwardCall) {
        let call = Shared(*call);
        // SAFETY: the caller's promise; every block has tokens of its own.
        unsafe {
            let gradient = self.gradient(&call.0.grad, call.0.tokens);
            threads.each(block_count(call.0.tokens), self.cost(call.0.tokens), |_, index| {
                let call = &call;
                self.backward_block(&call.0, &gradient, block(call.0.tokens, index))
            });
        }
    }

    unsafe fn backward_block(
        &self,
        call: &BackwardCall,
        gradient: &Gradient<'_>,
        block: Range<usize>,
    ) {
        for start in block.clone().step_by(SLAB) {
            let (mut coef, mut out) =
                (RowList::new(std::ptr::null()), RowList::new(std::ptr::null_mut()));
            // SAFETY: the caller's promise: the slab's tokens exist.
            unsafe {
                for t in start..block.end.min(start + SLAB) {
                    coef.push(call.coef.row(t).cast::<f32>().cast_const());
                    out.push(call.grad.rows.row(t));
                }
                self.gradient_rows(gradient, call.grad.rows.dtype, coef.get(), out.get());
            }
        }
    }

    /// weight · hidden of a slab.
    unsafe fn dots(&self, dtype: DType, hidden: &[*const u8], out: &[*mut f32]) {
        let (d_in, count) = (self.rows.d_in, self.rows.count());
        // SAFETY: the caller's promise; `isa` is one that this machine has.
        unsafe {
            match (self.isa, dtype, &self.bf16) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, DType::BF16, Some(panels)) => {
                    dots::<Direct<Split<super::lanes::Avx512>>>(panels, d_in, count, hidden, out)
                }
                #[cfg(test)]
                (Isa::PortableBf16, DType::BF16, Some(panels)) => {
                    dots::<Direct<Split<super::lanes::Portable>>>(panels, d_in, count, hidden, out)
                }
                _ => with_lanes!(self.isa, L => with_element!(dtype, E => {
                    dots::<Converted<L, E>>(&self.panels, d_in, count, hidden, out)
                })),
            }
        }
    }

    unsafe fn gradient(&self, grad: &Grad, tokens: usize) -> Gradient<'_> {
        let line = size_of::<Line>();
        let pitch = grad.rows.row_stride * grad.rows.dtype.size();
        let aligned = (grad.rows.data as usize).is_multiple_of(line) && pitch.is_multiple_of(line);
        let write = match grad.accumulate {
            true => Write::Add,
            false if aligned && tokens.saturating_mul(pitch) >= STREAM_BYTES => Write::Stream,
            false => Write::Store,
        };
        Gradient {
            panels: self.panels,
            d_in: self.rows.d_in,
            count: self.rows.count(),
            // SAFETY: the caller's promise.
            factor: unsafe { grad.factor() } as f32,
            write,
        }
    }

    unsafe fn gradient_rows(
        &self,
        gradient: &Gradient<'_>,
        dtype: DType,
        coef: &[*const f32],
        out: &[*mut u8],
    ) {
        // SAFETY: the caller's promise; `isa` is one that this machine has.
        unsafe {
            with_lanes!(self.isa, L => with_element!(dtype, E => gradient.run::<L, E>(coef, out)))
        }
    }
}

/// Adds the blocks' sums in their order.
unsafe fn reduce(call: &PenaltyCall, scratch: &Scratch) {
    let total = |i: usize| {
        // SAFETY: the caller's promise: every block has been written.
        (0..block_count(call.tokens)).map(|block| unsafe { scratch.block(block)[i] }).sum::<f64>()
    };
    // SAFETY: the caller's promise: outputs have their elements.
    unsafe {
        if let Some(out) = &call.loss_sum {
            out.set(0, total(0));
        }
        if let Some(out) = &call.token_count {
            out.set(0, total(1));
        }
        if let Some(out) = &call.latent_loss {
            (0..scratch.count).for_each(|k| out.set(k, total(2 + k)));
        }
    }
}
