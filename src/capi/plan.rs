use std::ffi::c_char;
use std::sync::Arc;

use super::latents::blockem_latents;
use super::sae::blockem_sae;
use super::tensor::{BLOCKEM_DEVICE_CPU, BLOCKEM_DEVICE_CUDA};
use super::{
    blockem_status, check_out, fixed_text, free, guard, handle, read_options, tensor, versioned,
    write_struct,
};
use crate::error::{Result, bail};
use crate::plan::{Activation, BackendKind, Part, Plan, PlanOptions};
use crate::tensor::Device;

/// The device's own backend.
pub const BLOCKEM_BACKEND_AUTO: i32 = 0;
/// The CPU kernels.
pub const BLOCKEM_BACKEND_CPU: i32 = 1;
/// The CUDA kernels.
pub const BLOCKEM_BACKEND_CUDA: i32 = 2;
/// The slow f64 oracle on the CPU; hidden, reference, latents, coef and gradients may be F64.
pub const BLOCKEM_BACKEND_REFERENCE: i32 = 3;

/// The file's own rule, as its owner's library loads it by default.
pub const BLOCKEM_ACTIVATION_NATIVE: i32 = 0;
/// relu of the pre-activation: no threshold, no top-k (what BLOCK-EM's authors use).
pub const BLOCKEM_ACTIVATION_DENSE_RELU: i32 = 1;
/// The pre-activation itself: no gate.
pub const BLOCKEM_ACTIVATION_PREACTIVATION: i32 = 2;

/// All of z.
pub const BLOCKEM_PART_WHOLE: i32 = 0;
/// W . h over some columns of hidden, without bias and gate.
pub const BLOCKEM_PART_COLUMNS: i32 = 1;
/// From W . h on: bias, gate and penalty.
pub const BLOCKEM_PART_GATE: i32 = 2;

/// SAE x latent set x device: the blocked rows, gathered and folded. Never changes after creation,
/// so any number of threads may use it at once.
pub struct blockem_plan(pub(super) Arc<Plan>);

/// How a plan is made; all zero is the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_plan_options {
    /// sizeof(blockem_plan_options), set by BLOCKEM_PLAN_OPTIONS_INIT.
    pub struct_size: usize,
    /// BLOCKEM_DEVICE_...
    pub device_type: i32,
    /// Which device of that type.
    pub device_index: i32,
    /// BLOCKEM_BACKEND_...
    pub backend: i32,
    /// BLOCKEM_ACTIVATION_...
    pub activation: i32,
    /// CPU worker threads of a run call; 0 means one for each available core, 1 runs on the
    /// calling thread. Values do not depend on it.
    pub num_threads: i32,
    /// Zero.
    pub reserved: i32,
    /// BLOCKEM_PART_... For tensor parallelism, where each process holds some columns of hidden
    /// [T, d]: each makes one plan of the part COLUMNS and one of the part GATE. blockem_encode of
    /// COLUMNS writes the columns' share of W . h; the processes add these [T, K] up (all-reduce). In
    /// calls of GATE the sums are hidden, F32 [T, K]: blockem_encode gives z, the penalty calls loss,
    /// coef, and in grad_hidden the gradient of the sums. With that as coef,
    /// blockem_penalty_backward of COLUMNS writes dH of its columns. GATE keeps K x K numbers.
    pub part: i32,
    /// Zero.
    pub reserved2: i32,
    /// With COLUMNS: hidden is [T, column_end - column_begin], these columns of the SAE's d; else
    /// both are zero.
    pub column_begin: i64,
    pub column_end: i64,
}
versioned!(blockem_plan_options, first_size = 32, last = column_end: i64);

/// What a plan is. Filled by blockem_plan_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_plan_info {
    /// sizeof(blockem_plan_info), set by BLOCKEM_PLAN_INFO_INIT.
    pub struct_size: usize,
    /// Columns of hidden: d; of the part COLUMNS theirs, of GATE K.
    pub d_in: i64,
    /// F: latents of the dictionary.
    pub d_sae: i64,
    /// K: columns of latents, reference and coef.
    pub num_latents: i64,
    /// How many of them have sign +1.
    pub num_positive: i64,
    /// 0-based decoder block in which the SAE's site lies; -1 when the SAE does not say.
    pub layer: i64,
    /// BLOCKEM_DEVICE_...
    pub device_type: i32,
    /// Which device of that type.
    pub device_index: i32,
    /// BLOCKEM_BACKEND_... that was chosen, never AUTO.
    pub backend: i32,
    /// BLOCKEM_ACTIVATION_...
    pub activation: i32,
    /// Worker threads of a run call; 0 on CUDA.
    pub num_threads: i32,
    /// Zero.
    pub reserved: i32,
    /// sha256 in hexadecimal of all that z depends on: rows, recipe, activation, d, F.
    pub identity: [c_char; 72],
    /// Names the arithmetic: plans with one identity and one numerics give the same z, bit for
    /// bit.
    pub numerics: [c_char; 64],
    /// 1 where blockem_encode needs a workspace: the native activation of a TOPK SAE, GLU encoders,
    /// and on CUDA SAEs that normalise every token.
    pub encode_needs_workspace: i32,
    /// 1 where blockem_penalty_backward needs hidden and a workspace: SAEs that normalise every
    /// token, and GLU encoders.
    pub backward_needs_hidden: i32,
}
versioned!(blockem_plan_info, first_size = 208, last = backward_needs_hidden: i32);

/// Gathers the rows of a latent set from an SAE for a device. The plan keeps copies: the SAE and
/// the set may be freed. Reads only the rows that are needed: those of the set, and for the native
/// activation of a TOPK SAE all of the dictionary (of GROUPS: of the set's groups), which the plan
/// keeps too.
/// options: NULL for the defaults (CPU, native activation, all cores, all of z).
/// out: a new handle, to be freed with blockem_plan_free; untouched on error.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT, LATENT_RANGE, UNSUPPORTED (native
/// activation of a TOPK SAE that is partial or selects over a BATCH; a part of it, of an SAE that
/// normalises every token, or of a GLU encoder), OUT_OF_MEMORY, IO, FORMAT, TENSOR_MISSING,
/// NON_FINITE, PROVENANCE_MISMATCH; on CUDA also CUDA_UNAVAILABLE, CUDA_DRIVER, NO_KERNEL_IMAGE,
/// DRIVER_TOO_OLD, OUT_OF_MEMORY, CAPTURE_UNSAFE, FORKED. Thread-safe.
/// On CUDA the plan belongs to the thread's current context where that is one of the device, else
/// to the device's primary context, which it keeps alive; the current context stays what it was.
/// A context that the host destroys must outlive its plans. Not for use while a stream is captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_plan_create(
    sae: *const blockem_sae,
    latents: *const blockem_latents,
    options: *const blockem_plan_options,
    out: *mut *mut blockem_plan,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: live handles and a sized struct, or NULL.
        let (sae, latents, options) = unsafe {
            (handle("sae", sae)?, handle("latents", latents)?, read_options("options", options)?)
        };
        let options = match options {
            Some(options) => plan_options(&options)?,
            None => PlanOptions::default(),
        };
        let plan = Plan::new(&sae.0, &latents.0, &options)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_plan(Arc::new(plan)))) };
        Ok(())
    })
}

/// Describes a plan.
/// Errors: NULL_POINTER, STRUCT_SIZE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_plan_info_get(
    plan: *const blockem_plan,
    info: *mut blockem_plan_info,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let plan = unsafe { &handle("plan", plan)?.0 };
        let (device_type, device_index) = device_codes(plan.device());
        let value = blockem_plan_info {
            struct_size: size_of::<blockem_plan_info>(),
            d_in: plan.d_in() as i64,
            d_sae: plan.d_sae() as i64,
            num_latents: plan.num_latents() as i64,
            num_positive: plan.num_positive() as i64,
            layer: plan.layer().unwrap_or(-1),
            device_type,
            device_index,
            backend: plan.backend() as i32,
            activation: plan.activation() as i32,
            num_threads: plan.num_threads() as i32,
            reserved: 0,
            identity: fixed_text(plan.identity()),
            numerics: fixed_text(&plan.numerics()),
            encode_needs_workspace: plan.encode_needs_workspace() as i32,
            backward_needs_hidden: plan.backward_needs_hidden() as i32,
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}

/// Writes the bytes of workspace that blockem_penalty_forward and blockem_penalty need for so many
/// tokens, and the other two where blockem_plan_info says that they need one; it may be 0. Any workspace must start at a multiple
/// of 64 bytes; calls that run at the same time need one each.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (negative tokens). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_plan_workspace_size(
    plan: *const blockem_plan,
    tokens: i64,
    bytes: *mut usize,
) -> blockem_status {
    guard(|| {
        check_out("bytes", bytes)?;
        // SAFETY: a live handle, or NULL.
        let plan = unsafe { &handle("plan", plan)?.0 };
        let Ok(tokens) = usize::try_from(tokens) else {
            bail!(InvalidArgument, "tokens is negative: {tokens}");
        };
        // SAFETY: checked above.
        unsafe { *bytes = plan.workspace_size(tokens) };
        Ok(())
    })
}

/// Frees a plan; NULL is legal. No call may still be using it, no work of one may be unfinished on a
/// stream, and no captured graph that holds one may be launched again. In a child of fork the memory
/// of a CUDA plan stays with the parent.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_plan_free(plan: *mut blockem_plan) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(plan) }
}

/// BLOCKEM_DEVICE_... and which one of that type.
pub(super) fn device_codes(device: Device) -> (i32, i32) {
    match device {
        Device::Cpu => (BLOCKEM_DEVICE_CPU, 0),
        Device::Cuda(index) => (BLOCKEM_DEVICE_CUDA, index),
    }
}

pub(super) fn plan_options(options: &blockem_plan_options) -> Result<PlanOptions> {
    if options.reserved != 0 || options.reserved2 != 0 {
        bail!(InvalidArgument, "options.reserved and reserved2 must be 0");
    }
    let Some(activation) = Activation::from_code(options.activation) else {
        bail!(InvalidArgument, "there is no activation {}", options.activation);
    };
    Ok(PlanOptions {
        device: tensor::device("options", options.device_type, options.device_index)?,
        backend: backend(options.backend)?,
        activation,
        num_threads: num_threads(options.num_threads)?,
        part: part(options)?,
    })
}

fn part(options: &blockem_plan_options) -> Result<Part> {
    let (begin, end) = (options.column_begin, options.column_end);
    match (options.part, usize::try_from(begin), usize::try_from(end)) {
        (BLOCKEM_PART_COLUMNS, Ok(begin), Ok(end)) => Ok(Part::Columns { begin, end }),
        (BLOCKEM_PART_WHOLE, Ok(0), Ok(0)) => Ok(Part::Whole),
        (BLOCKEM_PART_GATE, Ok(0), Ok(0)) => Ok(Part::Gate),
        (BLOCKEM_PART_WHOLE..=BLOCKEM_PART_GATE, ..) => bail!(
            InvalidArgument,
            "the columns {begin} to {end} do not fit the part: COLUMNS takes a range, the others 0"
        ),
        (other, ..) => bail!(InvalidArgument, "there is no part {other}"),
    }
}

pub(super) fn backend(code: i32) -> Result<BackendKind> {
    match BackendKind::from_code(code) {
        Some(backend) => Ok(backend),
        None => bail!(InvalidArgument, "there is no backend {code}"),
    }
}

pub(super) fn num_threads(count: i32) -> Result<usize> {
    match usize::try_from(count) {
        Ok(count) if count <= 1024 => Ok(count),
        _ => bail!(InvalidArgument, "num_threads is {count}; 0 to 1024 are possible"),
    }
}
