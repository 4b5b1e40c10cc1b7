//! The CPU backend: packed rows, and threads that take a call's tokens block by block.
//!
//! Every number depends on its own inputs only, in an order that no tile, thread or instruction
//! set changes. The one exception has a name of its own: machines with a bf16 dot product multiply
//! bf16 hidden states against rows in two bf16 terms.

mod encode;
mod finish;
mod glu;
mod gradient;
mod lanes;
mod norm;
mod pack;
mod slab;
mod stats;
mod steer;
#[cfg(test)]
mod tests;
mod threads;
mod topk;

use self::lanes::{Isa, LANES, Line};
use self::pack::{Panels, bf16_lines, f32_lines, pack_bf16, pack_f32};
use self::slab::Kernels;
pub(crate) use self::stats::CpuStats;
pub(crate) use self::steer::{CpuSteering, token_norms};
use self::threads::Threads;
use self::topk::OwnedRivals;
use super::{
    Backend, BackwardCall, EncodeCall, Gate, OwnedRows, PenaltyCall, ReadRivals, Rows, Workspace,
    bounded,
};
use crate::error::Result;
use crate::tensor::{DType, Stream};

/// The instruction set that the kernels use on this machine.
pub(crate) fn isa_name() -> &'static str {
    Isa::detect().name()
}

/// Makes kernels use an instruction set by its name; false where the machine lacks it.
#[cfg(feature = "test-isa")]
pub(crate) fn use_isa(name: &str) -> bool {
    lanes::chosen::set(name)
}

/// A plan's rows, packed, and its threads.
pub(crate) struct Cpu {
    isa: Isa,
    rows: OwnedRows,
    panels: Box<[Line]>,
    bf16_panels: Option<Box<[Line]>>,
    /// Of a TopK gate.
    rivals: Option<OwnedRivals>,
    threads: Threads,
}

impl Cpu {
    /// `num_threads` 0 means one for each available core.
    pub fn new(rows: &Rows<'_>, rivals: ReadRivals<'_>, num_threads: usize) -> Result<Cpu> {
        Cpu::with_isa(rows, rivals, num_threads, Isa::detect())
    }

    fn with_isa(
        rows: &Rows<'_>,
        rivals: ReadRivals<'_>,
        num_threads: usize,
        isa: Isa,
    ) -> Result<Cpu> {
        let lines = |n| vec![Line([0.0; LANES]); n].into_boxed_slice();
        let mut panels = lines(f32_lines(rows.products(), rows.d_in));
        pack_f32(rows, &mut panels);
        let rivals = match rows.gate {
            Gate::TopK(gate) => Some(OwnedRivals::pack(gate.rivals(), rows, rivals)?),
            _ => None,
        };
        // Rivals are kept in one form, and a latent must compare with its own value exactly.
        let bf16_panels = (isa.has_bf16_dot() && rivals.is_none()).then(|| {
            let mut panels = lines(bf16_lines(rows.products(), rows.d_in));
            pack_bf16(rows, &mut panels);
            panels
        });
        let threads = Threads::pool(num_threads);
        Ok(Cpu { isa, rows: rows.without_weight(), panels, bf16_panels, rivals, threads })
    }

    fn kernels(&self) -> Kernels<'_> {
        let rows = self.rows.borrow();
        Kernels {
            isa: self.isa,
            rows,
            panels: Panels::f32(&self.panels, rows.d_in),
            bf16: self.bf16_panels.as_ref().map(|lines| Panels::bf16(lines, rows.d_in)),
            rivals: self.rivals.as_ref().map(OwnedRivals::borrow),
        }
    }

    /// Bytes of scratch for [`Cpu::raw_penalty`] and [`Cpu::raw_backward`].
    pub fn raw_workspace_size(
        count: usize,
        d_in: usize,
        tokens: usize,
        num_threads: usize,
    ) -> usize {
        let panels = bounded(count, d_in, || {
            let lines = f32_lines(count, d_in) + raw_bf16_lines(Isa::detect(), count, d_in);
            lines * size_of::<Line>()
        });
        let threads = Threads::scoped(num_threads).count();
        let work = Kernels::workspace_size(Gate::Open, [count, 1], tokens, threads);
        panels.saturating_add(work).min(isize::MAX as usize)
    }

    /// The penalty of rows that are packed into the call's workspace first.
    ///
    /// # Safety
    /// As [`Backend`]; the workspace has [`Cpu::raw_workspace_size`] bytes.
    pub unsafe fn raw_penalty(rows: &Rows<'_>, call: &PenaltyCall, num_threads: usize) {
        // SAFETY: the caller's promise.
        unsafe { raw_penalty(Isa::detect(), rows, call, num_threads) }
    }

    /// dH with rows that are packed into `workspace` first.
    ///
    /// # Safety
    /// As [`Cpu::raw_penalty`].
    pub unsafe fn raw_backward(
        rows: &Rows<'_>,
        call: &BackwardCall,
        workspace: Workspace,
        num_threads: usize,
    ) {
        let isa = Isa::detect();
        // SAFETY: the caller's promise.
        unsafe {
            let (kernels, _) = raw_kernels(isa, rows, call.grad.rows.dtype, workspace);
            kernels.backward(&Threads::scoped(num_threads), call)
        }
    }
}

impl Backend for Cpu {
    fn numerics(&self) -> String {
        if self.bf16_panels.is_some() { "cpu-1-bf16dot".into() } else { "cpu-1".into() }
    }

    fn num_threads(&self) -> usize {
        self.threads.count()
    }

    fn workspace_size(&self, tokens: usize) -> usize {
        let rows = self.rows.borrow();
        let shape = [rows.count(), rows.width()];
        Kernels::workspace_size(rows.gate, shape, tokens, self.threads.count())
    }

    unsafe fn encode(&self, call: &EncodeCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.kernels().encode(&self.threads, call) };
        Ok(())
    }

    unsafe fn penalty(&self, call: &PenaltyCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.kernels().penalty(&self.threads, call) };
        Ok(())
    }

    unsafe fn backward(&self, call: &BackwardCall, _: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.kernels().backward(&self.threads, call) };
        Ok(())
    }
}

/// Lines of bf16 panels in a raw call's workspace.
fn raw_bf16_lines(isa: Isa, count: usize, d_in: usize) -> usize {
    if isa.has_bf16_dot() { bf16_lines(count, d_in) } else { 0 }
}

/// # Safety
/// As [`Cpu::raw_penalty`], on a machine that has `isa`.
unsafe fn raw_penalty(isa: Isa, rows: &Rows<'_>, call: &PenaltyCall, num_threads: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let (kernels, workspace) = raw_kernels(isa, rows, call.hidden.dtype, call.workspace);
        kernels.penalty(&Threads::scoped(num_threads), &PenaltyCall { workspace, ..*call })
    }
}

/// Packs rows into the workspace; returns what is left of it.
///
/// # Safety
/// The workspace has room for the panels and is aligned to lines.
unsafe fn raw_kernels<'a>(
    isa: Isa,
    rows: &Rows<'a>,
    hidden: DType,
    workspace: Workspace,
) -> (Kernels<'a>, Workspace) {
    let f32_len = f32_lines(rows.count(), rows.d_in);
    let bf16_len = raw_bf16_lines(isa, rows.count(), rows.d_in);
    let lines = workspace.data.cast::<Line>();
    // SAFETY: the caller's promise; the two parts and the rest are apart.
    let (panels, bf16_panels) = unsafe {
        let panels = std::slice::from_raw_parts_mut(lines, f32_len);
        (panels, std::slice::from_raw_parts_mut(lines.add(f32_len), bf16_len))
    };
    pack_f32(rows, panels);
    let bf16 = (isa.has_bf16_dot() && hidden == DType::BF16).then(|| {
        pack_bf16(rows, bf16_panels);
        Panels::bf16(bf16_panels, rows.d_in)
    });
    let used = (f32_len + bf16_len) * size_of::<Line>();
    let rest = Workspace { data: workspace.data.wrapping_add(used), size: workspace.size - used };
    let panels = Panels::f32(panels, rows.d_in);
    (Kernels { isa, rows: *rows, panels, bf16, rivals: None }, rest)
}
