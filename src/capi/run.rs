use std::ffi::c_void;

use super::plan::blockem_plan;
use super::tensor::blockem_tensor;
use super::{blockem_status, guard, handle, read_stream, read_struct, versioned};
use crate::error::{Result, bail};
use crate::penalty::{EncodeArgs, PenaltyArgs, Scratch};
use crate::plan::Plan;
use crate::tensor::Stream;

/// Arguments of blockem_encode.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_encode_args {
    /// sizeof(blockem_encode_args), set by BLOCKEM_ENCODE_ARGS_INIT.
    pub struct_size: usize,
    /// [T, d] F32, F16 or BF16; rows may be strided.
    pub hidden: blockem_tensor,
    /// [T, K] F32, written.
    pub latents: blockem_tensor,
    /// Scratch memory on the plan's device, starting at a multiple of 64 bytes. Needed only where
    /// blockem_plan_info.encode_needs_workspace is 1; may be NULL elsewhere.
    pub workspace: *mut c_void,
    /// Its bytes; at least what blockem_plan_workspace_size says.
    pub workspace_size: usize,
}
versioned!(blockem_encode_args, first_size = 184, last = workspace_size: usize);

/// Arguments of blockem_penalty_forward, blockem_penalty_backward and blockem_penalty. All tensors
/// belong to the caller, live on the plan's device and are only touched until the call's work is
/// done. Rows may be strided; the elements of a row are adjacent. Outputs overlap nothing else.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_penalty_args {
    /// sizeof(blockem_penalty_args), set by BLOCKEM_PENALTY_ARGS_INIT.
    pub struct_size: usize,
    /// [T, d] F32, F16 or BF16.
    pub hidden: blockem_tensor,
    /// [T, K] F32: z of the base model's hidden states.
    pub reference: blockem_tensor,
    /// [T] U8, BOOL or F32 m_t; absent means 1 for each token.
    pub mask: blockem_tensor,
    /// [T, K] F32 coef[t,k] = m_t 2 w_k s_k relu(s_k (z - zref)) act'(pre): written by forward
    /// (optional), read by backward, written by blockem_penalty (optional).
    pub coef: blockem_tensor,
    /// [1] F32 or F64, optional.
    pub loss_sum: blockem_tensor,
    /// [1] F32 or F64, optional: sum_t m_t.
    pub token_count: blockem_tensor,
    /// [K] F32 or F64, optional: the share of each latent in loss_sum.
    pub latent_loss: blockem_tensor,
    /// [T, d] F32 or hidden's dtype: written by backward and by blockem_penalty.
    pub grad_hidden: blockem_tensor,
    /// 0 overwrites grad_hidden; 1 adds to it: reads, adds in f32, rounds once.
    pub accumulate: i32,
    /// Zero.
    pub reserved: i32,
    /// Multiplies the gradient; BLOCKEM_PENALTY_ARGS_INIT sets 1.
    pub scale: f64,
    /// [1] F32, optional: multiplies scale, read when the work runs (upstream gradient, lambda,
    /// 1/count).
    pub scale_tensor: blockem_tensor,
    /// Scratch memory on the plan's device, starting at a multiple of 64 bytes.
    pub workspace: *mut c_void,
    /// Its bytes; at least what blockem_plan_workspace_size says, for forward and
    /// blockem_penalty, and for backward where blockem_plan_info.backward_needs_hidden is 1.
    pub workspace_size: usize,
}
versioned!(blockem_penalty_args, first_size = 832, last = workspace_size: usize);

/// z[t,k] = act(W_k . h_t + b_k): references for later calls.
/// A token's z has the same bits whatever T, its place, the other latents, the strides, the number
/// of threads and the entry point (encode, forward, blockem_penalty, raw).
/// stream: NULL on the CPU, where the call returns when the work is done. On CUDA a CUstream (a
/// cudaStream_t) of the plan's context, or NULL for that context's legacy default stream; the call
/// returns when the work is on the stream, and may be captured into a graph. The thread's current
/// context stays what it was.
/// Errors: NULL_POINTER, STRUCT_SIZE, SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH (also a pointer that is
/// no memory of the plan's device), OVERLAP, INVALID_ARGUMENT (also a stream of another context);
/// on CUDA also CUDA_DRIVER, CAPTURE_UNSAFE, FORKED.
/// The native activation of a TOPK SAE compares with every latent of the dictionary: it needs
/// workspace (WORKSPACE_TOO_SMALL), and takes as long as encoding them all.
/// Thread-safe: no allocation, no lock held across calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_encode(
    plan: *const blockem_plan,
    args: *const blockem_encode_args,
    stream: *mut c_void,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle and a sized struct, or NULL; tensors as their comments say.
        unsafe {
            let plan = &handle("plan", plan)?.0;
            let args = read_struct("args", args)?;
            let stream = read_stream(plan.device(), stream)?;
            let mut args = EncodeArgs {
                hidden: args.hidden.required("hidden")?,
                latents: args.latents.required_mut("latents")?,
                workspace: scratch(args.workspace, args.workspace_size)?,
            };
            plan.encode_on(stream, &mut args)
        }
    })
}

/// loss_sum = sum_t m_t sum_k w_k relu(s_k (z[t,k] - zref[t,k]))^2, token_count = sum_t m_t, and
/// the coefficients that the backward call needs. BLOCK-EM's penalty is loss_sum / token_count
/// (arXiv 2602.00767, L_block); it is returned in two parts because a mean of means is wrong under
/// gradient accumulation and data parallelism.
/// Reads hidden, reference, mask; writes coef, loss_sum, token_count, latent_loss where given.
/// NaN in hidden or reference of a token with m_t != 0 gives a NaN loss. A mask of zeros gives 0, 0.
/// stream, errors, thread-safety: as blockem_encode; also WORKSPACE_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_penalty_forward(
    plan: *const blockem_plan,
    args: *const blockem_penalty_args,
    stream: *mut c_void,
) -> blockem_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { run(plan, args, stream, Plan::forward_on) })
}

/// grad_hidden[t,:] (+)= scale * sum_k coef[t,k] W_k.
/// Reads coef, scale_tensor; writes or adds to grad_hidden. A token without a coefficient other
/// than 0 gets a row of zeros, and is left untouched when accumulating.
/// hidden may be absent and no workspace is needed, except where
/// blockem_plan_info.backward_needs_hidden is 1: those SAEs normalise every token or gate every
/// latent by a second encoder, and the gradient is that of the norm or the gate too.
/// stream, errors, thread-safety: as blockem_encode.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_penalty_backward(
    plan: *const blockem_plan,
    args: *const blockem_penalty_args,
    stream: *mut c_void,
) -> blockem_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { run(plan, args, stream, Plan::backward_on) })
}

/// Forward and backward in one pass over hidden: same bits as the two calls (the REFERENCE backend
/// keeps its coefficients in F64 in between).
/// stream, errors, thread-safety: as blockem_encode; also WORKSPACE_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_penalty(
    plan: *const blockem_plan,
    args: *const blockem_penalty_args,
    stream: *mut c_void,
) -> blockem_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { run(plan, args, stream, Plan::penalty_on) })
}

/// # Safety
/// A live handle and a sized struct, or NULL; tensors as their comments say.
unsafe fn run(
    plan: *const blockem_plan,
    args: *const blockem_penalty_args,
    stream: *mut c_void,
    work: fn(&Plan, Stream, &mut PenaltyArgs<'_>) -> Result<()>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        let plan = &handle("plan", plan)?.0;
        let args = read_struct("args", args)?;
        let stream = read_stream(plan.device(), stream)?;
        work(plan, stream, &mut penalty_args(&args)?)
    }
}

/// # Safety
/// Tensors and workspace must be valid for what they say, for 'a.
pub(super) unsafe fn penalty_args<'a>(args: &blockem_penalty_args) -> Result<PenaltyArgs<'a>> {
    check_flags(args.accumulate, args.reserved)?;
    // SAFETY: the caller's promise.
    unsafe {
        Ok(PenaltyArgs {
            hidden: args.hidden.optional("hidden")?,
            reference: args.reference.optional("reference")?,
            mask: args.mask.optional("mask")?,
            coef: args.coef.optional_mut("coef")?,
            loss_sum: args.loss_sum.optional_mut("loss_sum")?,
            token_count: args.token_count.optional_mut("token_count")?,
            latent_loss: args.latent_loss.optional_mut("latent_loss")?,
            grad_hidden: args.grad_hidden.optional_mut("grad_hidden")?,
            accumulate: args.accumulate == 1,
            scale: args.scale,
            scale_tensor: args.scale_tensor.optional("scale_tensor")?,
            workspace: scratch(args.workspace, args.workspace_size)?,
        })
    }
}

pub(super) fn check_flags(accumulate: i32, reserved: i32) -> Result<()> {
    if !matches!(accumulate, 0 | 1) || reserved != 0 {
        bail!(InvalidArgument, "accumulate must be 0 or 1 and reserved 0");
    }
    Ok(())
}

/// # Safety
/// The workspace must be valid for what it says, for 'a.
pub(super) unsafe fn scratch<'a>(workspace: *mut c_void, size: usize) -> Result<Scratch<'a>> {
    if size > isize::MAX as usize {
        bail!(InvalidArgument, "workspace_size is larger than memory");
    }
    match workspace.is_null() {
        true => Ok(Scratch::NONE),
        // SAFETY: the caller's promise.
        false => Ok(unsafe { Scratch::from_raw(workspace.cast(), size) }),
    }
}
