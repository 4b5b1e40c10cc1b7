//! The three run calls: tokens in blocks, blocks in slabs, a slab's dot products, formulas and
//! gradient while its rows are in cache.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::encode::{Converted, Direct, Split, dots};
use super::finish::{Coefficients, Latents, Normalize, pull};
use super::glu::{Preactivations, RowCoefficients};
use super::gradient::{Gradient, Normed, SLAB, Write};
use super::lanes::{Isa, Lanes, Line, with_element, with_lanes};
use super::norm::TokenScale;
use super::pack::Panels;
use super::threads::Threads;
use super::topk::{Rivals, Space, Tokens};
use crate::backend::{
    BackwardCall, EncodeCall, Gate, Grad, Matrix, PenaltyCall, Rows, Workspace, bounded,
};
use crate::sae::TokenNorm;
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
    /// Of a TopK gate.
    pub rivals: Option<Rivals<'a>>,
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

/// The workspace of a call: loss, count and per-latent losses of each block, then each worker's
/// coefficients of one slab, and of a GLU encoder the products beside them.
#[derive(Clone, Copy)]
struct Scratch {
    partials: *mut f64,
    coef: *mut f32,
    count: usize,
    /// Rows of each latent.
    width: usize,
}

// SAFETY: workers write disjoint parts: partials of their blocks, coefficients of their own.
unsafe impl Sync for Scratch {}

impl Scratch {
    fn partials_bytes(tokens: usize, count: usize) -> usize {
        (block_count(tokens) * (2 + count) * size_of::<f64>()).next_multiple_of(size_of::<Line>())
    }

    /// Floats of one token's coefficients, from line to line.
    fn coef_stride(count: usize) -> usize {
        count.next_multiple_of(super::lanes::LANES)
    }

    /// Floats of one token.
    fn stride([count, width]: [usize; 2]) -> usize {
        let dots = if width > 1 { Scratch::coef_stride(count * width) } else { 0 };
        Scratch::coef_stride(count) + dots
    }

    fn bytes(tokens: usize, shape: [usize; 2], workers: usize) -> usize {
        let workers = workers.min(block_count(tokens));
        let coef = workers * SLAB * Scratch::stride(shape) * size_of::<f32>();
        Scratch::partials_bytes(tokens, shape[0]) + coef
    }

    fn new(space: Workspace, tokens: usize, [count, width]: [usize; 2]) -> Scratch {
        let coef = space.data.wrapping_add(Scratch::partials_bytes(tokens, count));
        Scratch { partials: space.data.cast(), coef: coef.cast(), count, width }
    }

    /// loss, count, then one loss per latent.
    unsafe fn block<'a>(&self, block: usize) -> &'a mut [f64] {
        let len = 2 + self.count;
        // SAFETY: the workspace has room for every block, and one worker at a time works on it.
        unsafe { std::slice::from_raw_parts_mut(self.partials.add(block * len), len) }
    }

    unsafe fn token(&self, worker: usize, token: usize) -> *mut f32 {
        let row = (worker * SLAB + token) * Scratch::stride([self.count, self.width]);
        // SAFETY: the workspace has room for a slab of every worker, who alone uses it.
        unsafe { self.coef.add(row) }
    }

    unsafe fn coef<'a>(&self, worker: usize, token: usize) -> &'a mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.token(worker, token), self.count) }
    }

    /// The coefficients' own memory, unless a latent has two rows.
    unsafe fn dots<'a>(&self, worker: usize, token: usize) -> &'a mut [f32] {
        let skip = if self.width > 1 { Scratch::coef_stride(self.count) } else { 0 };
        // SAFETY: as above.
        unsafe {
            let start = self.token(worker, token).add(skip);
            std::slice::from_raw_parts_mut(start, self.count * self.width)
        }
    }
}

/// A call that the workers share.
pub(super) struct Shared<T>(pub T);

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

/// What a worker has for itself, and where thresholds are.
struct Own<'a> {
    worker: usize,
    scratch: &'a Scratch,
    space: Option<&'a Space>,
}

/// What the norm adds to the dH of each token of a slab; empty without one.
struct NormedList {
    rows: [MaybeUninit<Normed>; SLAB],
    len: usize,
}

impl NormedList {
    fn new() -> NormedList {
        NormedList { rows: [const { MaybeUninit::uninit() }; SLAB], len: 0 }
    }

    fn push(&mut self, token: TokenScale, pull: f64, hidden: *const u8, dtype: DType) {
        let TokenScale { scale, mean, pull: q } = token;
        self.rows[self.len].write(Normed { scale, mean, pull: q * pull, hidden, dtype });
        self.len += 1;
    }

    fn get(&self) -> &[Normed] {
        // SAFETY: so many have been written.
        unsafe { std::slice::from_raw_parts(self.rows.as_ptr().cast(), self.len) }
    }
}

impl Kernels<'_> {
    /// Bytes of scratch of a call, for so many latents of so many rows.
    pub fn workspace_size(
        gate: Gate<'_>,
        shape: [usize; 2],
        tokens: usize,
        threads: usize,
    ) -> usize {
        let topk = match gate {
            Gate::TopK(gate) => Space::bytes(gate, shape[1], tokens, threads),
            _ => 0,
        };
        let scratch =
            bounded(shape[0], block_count(tokens), || Scratch::bytes(tokens, shape, threads));
        topk.saturating_add(scratch).min(isize::MAX as usize)
    }

    fn cost(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.rows.products()).saturating_mul(self.rows.d_in)
    }

    fn scratch(&self, space: Workspace, tokens: usize) -> Scratch {
        Scratch::new(space, tokens, [self.rows.count(), self.rows.width()])
    }

    /// The thresholds of a TopK gate, at the head of the workspace, and the rest of it.
    ///
    /// # Safety
    /// As [`super::Backend`].
    pub unsafe fn thresholds(
        &self,
        threads: &Threads,
        tokens: &Tokens,
        workspace: Workspace,
    ) -> (Option<Space>, Workspace) {
        let (Gate::TopK(gate), Some(rivals)) = (self.rows.gate, &self.rivals) else {
            return (None, workspace);
        };
        let shape = [self.rows.width(), tokens.count];
        let (space, rest) = Space::split(workspace, gate, shape, threads.count());
        // SAFETY: the caller's promise.
        unsafe { self.find_thresholds(threads, gate, rivals, tokens, &space) };
        (Some(space), rest)
    }

    /// # Safety
    /// As [`super::Backend`].
    pub unsafe fn encode(&self, threads: &Threads, call: &EncodeCall) {
        let EncodeCall { tokens, hidden, workspace, .. } = *call;
        let call = Shared(*call);
        // SAFETY: the caller's promise; every block has tokens of its own.
        unsafe {
            let tokens = Tokens { count: tokens, hidden, mask: None };
            let (space, rest) = self.thresholds(threads, &tokens, workspace);
            let scratch = self.scratch(rest, tokens.count);
            threads.each(block_count(tokens.count), self.cost(tokens.count), |worker, index| {
                let own = Own { worker, scratch: &scratch, space: space.as_ref() };
                let call = &call;
                self.encode_block(&call.0, &own, block(call.0.tokens, index))
            });
        }
    }

    unsafe fn encode_block(&self, call: &EncodeCall, own: &Own<'_>, block: Range<usize>) {
        for start in block.clone().step_by(SLAB) {
            let (mut hidden, mut latents, mut dot) = (
                RowList::new(std::ptr::null()),
                RowList::new(std::ptr::null_mut()),
                RowList::new(std::ptr::null_mut()),
            );
            // SAFETY: the caller's promise: the slab's tokens exist.
            unsafe {
                for (i, t) in (start..block.end.min(start + SLAB)).enumerate() {
                    hidden.push(call.hidden.row(t).cast_const());
                    latents.push(call.latents.row(t).cast::<f32>());
                    // Two products of a latent do not fit where it goes.
                    dot.push(match self.rows.glu_bias {
                        Some(_) => own.scratch.dots(own.worker, i).as_mut_ptr(),
                        None => latents.rows[i],
                    });
                }
                let thresholds =
                    |i| own.space.map_or(&[][..], |space: &Space| space.thresholds(start + i));
                let dtype = call.hidden.dtype;
                self.latents(dtype, hidden.get(), [dot.get(), latents.get()], thresholds);
            }
        }
    }

    /// z of some tokens by way of their products, which without a GLU may be in the same place;
    /// `thresholds` are those of token i under a TopK gate.
    ///
    /// # Safety
    /// As [`super::Backend`]: rows of d_in elements, of so many products, and of K numbers.
    pub unsafe fn latents<'t>(
        &self,
        dtype: DType,
        hidden: &[*const u8],
        [dot, latents]: [&[*mut f32]; 2],
        thresholds: impl Fn(usize) -> &'t [f32],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            self.dots(dtype, hidden, dot);
            for (hidden, dot) in hidden.chunks(SLAB).zip(dot.chunks(SLAB)) {
                self.normalize(dtype, hidden, dot);
            }
            self.preactivations(dot, latents);
            for (i, row) in latents.iter().enumerate() {
                let row = std::slice::from_raw_parts_mut(*row, self.rows.count());
                let work = Latents { rows: &self.rows, row, thresholds: thresholds(i) };
                with_lanes!(self.isa, L => L::enter(work));
            }
        }
    }

    /// # Safety
    /// As [`super::Backend`].
    pub unsafe fn penalty(&self, threads: &Threads, call: &PenaltyCall) {
        let PenaltyCall { tokens, hidden, mask, workspace, .. } = *call;
        let call = Shared(*call);
        // SAFETY: the caller's promise; every block has tokens and partial sums of its own, every
        // worker its slab of coefficients, and the sums are read when all is done.
        unsafe {
            let tokens = Tokens { count: tokens, hidden, mask };
            let (space, rest) = self.thresholds(threads, &tokens, workspace);
            let scratch = self.scratch(rest, tokens.count);
            let grad = call.0.grad.map(|grad| self.gradient(&grad, tokens.count));
            threads.each(block_count(tokens.count), self.cost(tokens.count), |worker, index| {
                let own = Own { worker, scratch: &scratch, space: space.as_ref() };
                let call = &call;
                self.penalty_block(&call.0, grad.as_ref(), &own, index)
            });
            reduce(&call.0, &scratch)
        }
    }

    unsafe fn penalty_block(
        &self,
        call: &PenaltyCall,
        gradient: Option<&Gradient<'_>>,
        own: &Own<'_>,
        index: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let sums = own.scratch.block(index);
            sums.fill(0.0);
            let block = block(call.tokens, index);
            for start in block.clone().step_by(SLAB) {
                let slab = start..block.end.min(start + SLAB);
                self.penalty_slab(call, gradient, slab, own, sums);
            }
        }
    }

    /// Adds the slab's loss, count and per-latent losses to `sums`.
    unsafe fn penalty_slab(
        &self,
        call: &PenaltyCall,
        gradient: Option<&Gradient<'_>>,
        slab: Range<usize>,
        own: &Own<'_>,
        sums: &mut [f64],
    ) {
        let mut tokens = RowList::new((0, 0.0));
        let mut hidden = RowList::new(std::ptr::null());
        let mut dot = RowList::new(std::ptr::null_mut());
        let mut latents = RowList::new(std::ptr::null_mut());
        // SAFETY: the scratch has a slab of every worker, who alone uses it.
        let coef = |i| unsafe { own.scratch.coef(own.worker, i) };
        // SAFETY: the caller's promise: the slab's tokens exist.
        unsafe {
            for t in slab {
                let mask = call.mask.map_or(1.0, |mask| mask.get(t));
                if mask == 0.0 {
                    self.leave_out(call, t);
                    continue;
                }
                dot.push(own.scratch.dots(own.worker, tokens.len).as_mut_ptr());
                latents.push(coef(tokens.len).as_mut_ptr());
                hidden.push(call.hidden.row(t).cast_const());
                tokens.push((t, mask));
            }
            let dtype = call.hidden.dtype;
            self.dots(dtype, hidden.get(), dot.get());
            let scales = self.normalize(dtype, hidden.get(), dot.get());
            self.preactivations(dot.get(), latents.get());
            let [loss, count, latent_loss @ ..] = sums else { return };
            let mut normed = NormedList::new();
            for (i, (t, mask)) in tokens.get().iter().enumerate() {
                let latent_loss = call.latent_loss.is_some().then_some(&mut *latent_loss);
                let reference = call.reference.row(*t).cast::<f32>().cast_const();
                let mut pull = 0.0;
                let work = Coefficients {
                    rows: &self.rows,
                    row: coef(i),
                    reference,
                    mask: *mask,
                    latent_loss,
                    thresholds: own.space.map_or(&[][..], |space| space.thresholds(*t)),
                    pull: scales
                        .as_ref()
                        .filter(|_| self.rows.glu_bias.is_none())
                        .map(|_| &mut pull),
                };
                *loss += with_lanes!(self.isa, L => L::enter(work));
                *count += *mask as f64;
                if let Some(out) = &call.coef {
                    out.row(*t)
                        .cast::<f32>()
                        .copy_from_nonoverlapping(coef(i).as_ptr(), self.rows.count());
                }
                if gradient.is_some() && self.rows.glu_bias.is_some() {
                    pull = self.row_coefficients(coef(i), dot.get()[i]);
                }
                if let Some(scales) = &scales {
                    normed.push(scales[i], pull, hidden.get()[i], dtype);
                }
            }
            if let (Some(gradient), Some(grad)) = (gradient, &call.grad) {
                let mut out = RowList::new(std::ptr::null_mut());
                tokens.get().iter().for_each(|(t, _)| out.push(grad.rows.row(*t)));
                let coef = dot.rows.map(|row| row.cast_const());
                let grad_dtype = grad.rows.dtype;
                self.gradient_rows(gradient, grad_dtype, &coef[..out.len], normed.get(), out.get());
            }
        }
    }

    /// Normalises the dot products of a slab, if tokens are normalised.
    unsafe fn normalize(
        &self,
        dtype: DType,
        hidden: &[*const u8],
        dot: &[*mut f32],
    ) -> Option<[TokenScale; SLAB]> {
        let Rows { norm, d_in, .. } = self.rows;
        if norm == TokenNorm::None {
            return None;
        }
        let mut scales = [TokenScale::ONE; SLAB];
        for (scale, (hidden, dot)) in scales.iter_mut().zip(hidden.iter().zip(dot)) {
            // SAFETY: the caller's promise: rows of d_in elements and of K numbers.
            unsafe {
                *scale = TokenScale::of(self.isa, norm, dtype, *hidden, d_in);
                let row = std::slice::from_raw_parts_mut(*dot, self.rows.products());
                with_lanes!(self.isa, L => L::enter(Normalize { row, scale: scale.scale }));
            }
        }
        Some(scales)
    }

    /// Of a GLU encoder: u of a slab's latents, from their products.
    unsafe fn preactivations(&self, dot: &[*mut f32], latents: &[*mut f32]) {
        if self.rows.glu_bias.is_none() {
            return;
        }
        for (dot, row) in dot.iter().zip(latents) {
            // SAFETY: the caller's promise: rows of 2K products and of K numbers, apart.
            unsafe {
                let dots = std::slice::from_raw_parts(*dot, self.rows.products());
                let row = std::slice::from_raw_parts_mut(*row, self.rows.count());
                let work = Preactivations { rows: &self.rows, dots, row };
                with_lanes!(self.isa, L => L::enter(work));
            }
        }
    }

    /// Of a GLU encoder: a token's products become the coefficients of their rows; returns
    /// Σ coef · product.
    unsafe fn row_coefficients(&self, coef: &[f32], dot: *mut f32) -> f64 {
        // SAFETY: the caller's promise: 2K products, apart from the coefficients.
        unsafe {
            let dots = std::slice::from_raw_parts_mut(dot, self.rows.products());
            let work = RowCoefficients { rows: &self.rows, coef, dots };
            with_lanes!(self.isa, L => L::enter(work))
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
        let scratch = self.scratch(call.workspace, call.tokens);
        let call = Shared(*call);
        // SAFETY: the caller's promise; every block has tokens of its own, every worker its scratch.
        unsafe {
            let gradient = self.gradient(&call.0.grad, call.0.tokens);
            threads.each(block_count(call.0.tokens), self.cost(call.0.tokens), |worker, index| {
                let own = Own { worker, scratch: &scratch, space: None };
                let call = &call;
                self.backward_block(&call.0, &gradient, &own, block(call.0.tokens, index))
            });
        }
    }

    unsafe fn backward_block(
        &self,
        call: &BackwardCall,
        gradient: &Gradient<'_>,
        own: &Own<'_>,
        block: Range<usize>,
    ) {
        for start in block.clone().step_by(SLAB) {
            let slab = start..block.end.min(start + SLAB);
            let (mut coef, mut out) =
                (RowList::new(std::ptr::null()), RowList::new(std::ptr::null_mut()));
            // SAFETY: the caller's promise: the slab's tokens exist.
            unsafe {
                for t in slab.clone() {
                    coef.push(call.coef.row(t).cast::<f32>().cast_const());
                    out.push(call.grad.rows.row(t));
                }
                let normed = self.products(call, slab, &mut coef, own);
                let dtype = call.grad.rows.dtype;
                self.gradient_rows(gradient, dtype, coef.get(), normed.get(), out.get());
            }
        }
    }

    /// Where dH needs a slab's products: what the norm of each token adds to it. Coefficients of a GLU
    /// encoder's latents become those of their rows.
    unsafe fn products(
        &self,
        call: &BackwardCall,
        slab: Range<usize>,
        coef: &mut RowList<*const f32>,
        own: &Own<'_>,
    ) -> NormedList {
        let mut normed = NormedList::new();
        let Some(rows) = call.hidden.filter(|_| self.rows.backward_needs_hidden()) else {
            return normed;
        };
        let (mut hidden, mut dot) =
            (RowList::new(std::ptr::null()), RowList::new(std::ptr::null_mut()));
        // SAFETY: the caller's promise: the slab's tokens exist.
        unsafe {
            for (i, t) in slab.enumerate() {
                hidden.push(rows.row(t).cast_const());
                dot.push(own.scratch.dots(own.worker, i).as_mut_ptr());
            }
            self.dots(rows.dtype, hidden.get(), dot.get());
            let scales = self.normalize(rows.dtype, hidden.get(), dot.get());
            for (i, dot) in dot.get().iter().enumerate() {
                let of_latents = std::slice::from_raw_parts(coef.rows[i], self.rows.count());
                let pull = match self.rows.glu_bias {
                    Some(_) => {
                        coef.rows[i] = *dot;
                        self.row_coefficients(of_latents, *dot)
                    }
                    None => {
                        let dot = std::slice::from_raw_parts(*dot, of_latents.len());
                        of_latents.iter().zip(dot).map(|(c, dot)| pull(*c, *dot)).sum()
                    }
                };
                if let Some(scales) = &scales {
                    normed.push(scales[i], pull, hidden.get()[i], rows.dtype);
                }
            }
        }
        normed
    }

    /// weight · hidden of a slab.
    unsafe fn dots(&self, dtype: DType, hidden: &[*const u8], out: &[*mut f32]) {
        let (d_in, count) = (self.rows.d_in, self.rows.products());
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
            count: self.rows.products(),
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
        normed: &[Normed],
        out: &[*mut u8],
    ) {
        // SAFETY: the caller's promise; `isa` is one that this machine has.
        unsafe {
            with_lanes!(self.isa, L => with_element!(dtype, E => {
                gradient.run::<L, E>(coef, normed, out)
            }))
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
