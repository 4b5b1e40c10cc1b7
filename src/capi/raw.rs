use std::ffi::c_void;

use super::run::{blockem_penalty_args, penalty_args};
use super::tensor::blockem_tensor;
use super::{blockem_status, check_out, guard, plan, read_stream, read_struct, versioned};
use crate::error::{Result, bail};
use crate::penalty::{
    PenaltyArgs, RawActivation, RawRows, raw_backward, raw_forward, raw_workspace_size,
};
use crate::plan::BackendKind;
use crate::tensor::Stream;

/// z = relu(pre)
pub const BLOCKEM_ACTIVATION_KIND_RELU: i32 = 0;
/// z = pre where pre > threshold, else 0
pub const BLOCKEM_ACTIVATION_KIND_JUMPRELU: i32 = 1;
/// z = relu(pre) where W . h + gate_bias > 0, else 0; pre = gate_scale (W . h) + bias
pub const BLOCKEM_ACTIVATION_KIND_GATED: i32 = 2;
/// z = relu(pre) of the k largest of the whole dictionary: SAE descriptions only.
pub const BLOCKEM_ACTIVATION_KIND_TOPK: i32 = 3;
/// z = pre: handle-free calls only.
pub const BLOCKEM_ACTIVATION_KIND_PREACTIVATION: i32 = 4;

/// Arguments of the handle-free calls: those of blockem_penalty_args in the same order, then the
/// rows. Arrays of K are contiguous. All live on one device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_raw_penalty_args {
    /// sizeof(blockem_raw_penalty_args), set by BLOCKEM_RAW_PENALTY_ARGS_INIT.
    pub struct_size: usize,
    /// [T, d] F32, F16 or BF16.
    pub hidden: blockem_tensor,
    /// [T, K] F32.
    pub reference: blockem_tensor,
    /// [T] U8, BOOL or F32, optional.
    pub mask: blockem_tensor,
    /// [T, K] F32.
    pub coef: blockem_tensor,
    /// [1] F32 or F64, optional.
    pub loss_sum: blockem_tensor,
    /// [1] F32 or F64, optional.
    pub token_count: blockem_tensor,
    /// [K] F32 or F64, optional.
    pub latent_loss: blockem_tensor,
    /// [T, d] F32 or hidden's dtype.
    pub grad_hidden: blockem_tensor,
    /// 0 overwrites grad_hidden, 1 adds to it.
    pub accumulate: i32,
    /// Zero.
    pub reserved: i32,
    /// Multiplies the gradient; BLOCKEM_RAW_PENALTY_ARGS_INIT sets 1.
    pub scale: f64,
    /// [1] F32, optional: multiplies scale.
    pub scale_tensor: blockem_tensor,
    /// Scratch memory; with NULL a CPU call allocates its own, and a CUDA call is refused.
    pub workspace: *mut c_void,
    /// Its bytes; at least what blockem_raw_penalty_workspace_size says, or 0 with NULL.
    pub workspace_size: usize,
    /// [K, d] F32 W; rows may be strided.
    pub weight: blockem_tensor,
    /// [K] F32.
    pub bias: blockem_tensor,
    /// [K] F32, JUMPRELU only.
    pub threshold: blockem_tensor,
    /// [K] F32: s_k w_k.
    pub sign_weight: blockem_tensor,
    /// BLOCKEM_ACTIVATION_KIND_...
    pub activation_kind: i32,
    /// CPU threads of the call; 0 means one for each available core.
    pub num_threads: i32,
    /// [K] F32, GATED only.
    pub gate_bias: blockem_tensor,
    /// [K] F32, optional: pre = gate_scale (W . h) + bias.
    pub gate_scale: blockem_tensor,
    /// BLOCKEM_BACKEND_...
    pub backend: i32,
    /// Zero.
    pub reserved2: i32,
}
versioned!(blockem_raw_penalty_args, first_size = 1376, last = reserved2: i32);

/// blockem_penalty_forward with every array given; with grad_hidden it is blockem_penalty. Same
/// bits as a plan of the same rows. On CUDA the rows are packed into the workspace by each call; it
/// runs in the stream's context (for NULL in the thread's current one, or the primary one of the
/// device), whose first raw call loads the kernels and may not be captured: CAPTURE_UNSAFE.
/// Errors: as blockem_penalty_forward; INVALID_ARGUMENT when the arrays do not fit the activation
/// kind; UNSUPPORTED for TOPK. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_raw_penalty_forward(
    args: *const blockem_raw_penalty_args,
    stream: *mut c_void,
) -> blockem_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { run(args, stream, raw_forward) })
}

/// blockem_penalty_backward with every array given.
/// Errors: as blockem_raw_penalty_forward. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_raw_penalty_backward(
    args: *const blockem_raw_penalty_args,
    stream: *mut c_void,
) -> blockem_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { run(args, stream, raw_backward) })
}

/// Writes the bytes of workspace that a raw call needs for T = tokens, K = num_latents, d = d_in
/// and its num_threads and backend; of AUTO what either device needs.
/// Errors: NULL_POINTER, INVALID_ARGUMENT. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_raw_penalty_workspace_size(
    tokens: i64,
    num_latents: i64,
    d_in: i64,
    backend: i32,
    num_threads: i32,
    bytes: *mut usize,
) -> blockem_status {
    guard(|| {
        check_out("bytes", bytes)?;
        let [Ok(t), Ok(k), Ok(d)] = [tokens, num_latents, d_in].map(usize::try_from) else {
            bail!(InvalidArgument, "a size is negative: {tokens}, {num_latents}, {d_in}");
        };
        if k.checked_mul(d).is_none_or(|n| n > isize::MAX as usize / 16) {
            bail!(InvalidArgument, "{k} rows of {d} are larger than memory");
        }
        let (backend, threads) = (plan::backend(backend)?, plan::num_threads(num_threads)?);
        // SAFETY: checked above.
        unsafe { *bytes = raw_workspace_size(k, d, t, backend, threads) };
        Ok(())
    })
}

type Raw = fn(&RawRows<'_>, &mut PenaltyArgs<'_>, BackendKind, usize, Stream) -> Result<()>;

/// # Safety
/// A sized struct or NULL; tensors as their comments say.
unsafe fn run(args: *const blockem_raw_penalty_args, stream: *mut c_void, work: Raw) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        let args = read_struct("args", args)?;
        if args.reserved2 != 0 {
            bail!(InvalidArgument, "reserved2 must be 0");
        }
        let rows = RawRows {
            weight: args.weight.required("weight")?,
            bias: args.bias.required("bias")?,
            sign_weight: args.sign_weight.required("sign_weight")?,
            kind: raw_kind(args.activation_kind)?,
            threshold: args.threshold.optional("threshold")?,
            gate_bias: args.gate_bias.optional("gate_bias")?,
            gate_scale: args.gate_scale.optional("gate_scale")?,
        };
        let stream = read_stream(rows.weight.device, stream)?;
        let backend = plan::backend(args.backend)?;
        let threads = plan::num_threads(args.num_threads)?;
        work(&rows, &mut penalty_args(&common(&args))?, backend, threads, stream)
    }
}

/// The part that the two structs share.
fn common(args: &blockem_raw_penalty_args) -> blockem_penalty_args {
    blockem_penalty_args {
        struct_size: size_of::<blockem_penalty_args>(),
        hidden: args.hidden,
        reference: args.reference,
        mask: args.mask,
        coef: args.coef,
        loss_sum: args.loss_sum,
        token_count: args.token_count,
        latent_loss: args.latent_loss,
        grad_hidden: args.grad_hidden,
        accumulate: args.accumulate,
        reserved: args.reserved,
        scale: args.scale,
        scale_tensor: args.scale_tensor,
        workspace: args.workspace,
        workspace_size: args.workspace_size,
    }
}

fn raw_kind(code: i32) -> Result<RawActivation> {
    match RawActivation::from_code(code) {
        Some(kind) => Ok(kind),
        None if code == BLOCKEM_ACTIVATION_KIND_TOPK => bail!(
            Unsupported,
            "a top-k over the given rows is not the SAE's: use RELU or PREACTIVATION"
        ),
        None => bail!(InvalidArgument, "there is no activation kind {code}"),
    }
}
