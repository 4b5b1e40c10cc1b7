use std::ffi::{c_char, c_void};

use super::latents::array;
use super::plan::{self, blockem_plan_options, device_codes, plan_options};
use super::sae::blockem_sae;
use super::tensor::blockem_tensor;
use super::{
    blockem_status, check_out, fixed_text, free, guard, handle, read_options, read_stream,
    read_struct, versioned, write_struct,
};
use crate::plan::PlanOptions;
use crate::steer::{SteerArgs, Steering, TokenNormsArgs, token_norms};

/// Unit decoder rows of some latents on a device, to push hidden states along. Never changes after
/// creation, so any number of threads may use it at once.
pub struct blockem_steering(Steering);

/// What a steering has. Filled by blockem_steering_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_steering_info {
    /// sizeof(blockem_steering_info), set by BLOCKEM_STEERING_INFO_INIT.
    pub struct_size: usize,
    /// d: columns of hidden.
    pub d_in: i64,
    /// n: how many latents, and what the rows of a call are below.
    pub num_latents: i64,
    /// 0-based decoder block in which the SAE's site lies; -1 when the SAE does not say.
    pub layer: i64,
    /// BLOCKEM_DEVICE_...
    pub device_type: i32,
    /// Which device of that type.
    pub device_index: i32,
    /// BLOCKEM_BACKEND_... that was chosen, never AUTO.
    pub backend: i32,
    /// Worker threads of a run call; 0 on CUDA.
    pub num_threads: i32,
    /// sha256, in hexadecimal, of the ids and the unit rows.
    pub identity: [c_char; 72],
}
versioned!(blockem_steering_info, first_size = 120, last = identity: [c_char; 72]);

/// Arguments of blockem_steer. All tensors belong to the caller, live on the steering's device and
/// are only touched until the call's work is done.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_steer_args {
    /// sizeof(blockem_steer_args), set by BLOCKEM_STEER_ARGS_INIT.
    pub struct_size: usize,
    /// [B, S, d] F32, F16 or BF16, changed in place. Both leading dimensions may be strided, in either
    /// order; the elements of a position are adjacent. It overlaps nothing else.
    pub hidden: blockem_tensor,
    /// [B] I64: for each row of the batch the latent, as its place (from 0) among the ids that the
    /// steering was made with; -1 leaves the row as it is.
    pub row: blockem_tensor,
    /// [B] F32: how far, in units of scale. Its sign is the direction's.
    pub strength: blockem_tensor,
    /// [B, S] U8 or BOOL (not 0 counts) or F32 m[b,s], which multiplies; absent means 1 for each
    /// position. Where it is 0 nothing is read and no bit changes.
    pub mask: blockem_tensor,
    /// Multiplies every strength, and must be finite; BLOCKEM_STEER_ARGS_INIT sets 1. BLOCK-EM uses
    /// the median of blockem_token_norms over tokens of the base model at the layer.
    pub scale: f64,
    /// [1] F32, optional: multiplies scale, read when the work runs.
    pub scale_tensor: blockem_tensor,
}
versioned!(blockem_steer_args, first_size = 456, last = scale_tensor: blockem_tensor);

/// Arguments of blockem_token_norms.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_token_norms_args {
    /// sizeof(blockem_token_norms_args), set by BLOCKEM_TOKEN_NORMS_ARGS_INIT.
    pub struct_size: usize,
    /// [T, d] F32, F16 or BF16 (F64 on the REFERENCE backend); rows may be strided.
    pub hidden: blockem_tensor,
    /// [T] F32 or F64 on the same device, written.
    pub norms: blockem_tensor,
    /// BLOCKEM_BACKEND_...
    pub backend: i32,
    /// CPU threads of the call; 0 means one for each available core.
    pub num_threads: i32,
}
versioned!(blockem_token_norms_args, first_size = 192, last = num_threads: i32);

/// Brings the decoder rows of n latents to a device, each divided by its norm in double precision and
/// rounded once. The SAE may be freed. A latent may be named twice.
/// sae: whole, or a partial file that has these latents. Folds of the SAE do not matter: what it
/// multiplies or shifts does not turn a decoder row.
/// options: as of blockem_plan_create; NULL for the defaults (CPU, all cores). activation is not used.
/// out: a new handle, to be freed with blockem_steering_free; untouched on error.
/// Errors: NULL_POINTER, STRUCT_SIZE, TENSOR_MISSING (the SAE has no decoder), LATENT_RANGE,
/// INVALID_ARGUMENT (no latents, a decoder row of zeros), NON_FINITE, UNSUPPORTED (options.part other
/// than BLOCKEM_PART_WHOLE), IO, FORMAT; those of devices as blockem_plan_create. Contexts and
/// threads: as blockem_plan_create.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_steering_create(
    sae: *const blockem_sae,
    ids: *const i64,
    n: usize,
    options: *const blockem_plan_options,
    out: *mut *mut blockem_steering,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: a live handle and a sized struct, or NULL; n ids.
        let (sae, options, ids) = unsafe {
            (handle("sae", sae)?, read_options("options", options)?, array("ids", ids, n)?)
        };
        let options = match options {
            Some(options) => plan_options(&options)?,
            None => PlanOptions::default(),
        };
        let steering = Steering::new(&sae.0, ids, &options)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_steering(steering))) };
        Ok(())
    })
}

/// Describes a steering.
/// Errors: NULL_POINTER, STRUCT_SIZE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_steering_info_get(
    steering: *const blockem_steering,
    info: *mut blockem_steering_info,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let steering = unsafe { &handle("steering", steering)?.0 };
        let (device_type, device_index) = device_codes(steering.device());
        let value = blockem_steering_info {
            struct_size: size_of::<blockem_steering_info>(),
            d_in: steering.d_in() as i64,
            num_latents: steering.latent_ids().len() as i64,
            layer: steering.layer().unwrap_or(-1),
            device_type,
            device_index,
            backend: steering.backend() as i32,
            num_threads: steering.num_threads() as i32,
            identity: fixed_text(steering.identity()),
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}

/// h[b,s,:] += strength[b] * scale * m[b,s] * D_k / |D_k|, k the latent of row[b] and D_k its decoder
/// row: h <- h + alpha * scale * (unit decoder row) of BLOCK-EM (arXiv 2602.00767, appendix A.3), with
/// another latent and strength in each row of a batch, so that one forward pass tries many.
/// The factor is rounded to F32 once; the sum is one fma in F32, rounded once more to F16 or BF16.
/// CPU and CUDA give the same bits, whatever B, S, the position's place and the number of threads. No
/// bit changes where row is -1 or where strength or mask is 0; other NaN stay NaN.
/// A row that is neither -1 nor a latent's: on the CPU LATENT_RANGE before anything is written; on
/// CUDA, where the call does not wait for it, the row's positions (but masked ones) become NaN.
/// stream, thread-safety: as blockem_encode; needs no workspace, may be captured.
/// Errors: as blockem_encode, and LATENT_RANGE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_steer(
    steering: *const blockem_steering,
    args: *const blockem_steer_args,
    stream: *mut c_void,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle and a sized struct, or NULL; tensors as their comments say.
        unsafe {
            let steering = &handle("steering", steering)?.0;
            let args = read_struct("args", args)?;
            let stream = read_stream(steering.device(), stream)?;
            let mut args = SteerArgs {
                hidden: args.hidden.required_mut("hidden")?,
                row: args.row.required("row")?,
                strength: args.strength.required("strength")?,
                mask: args.mask.optional("mask")?,
                scale: args.scale,
                scale_tensor: args.scale_tensor.optional("scale_tensor")?,
            };
            steering.steer_on(stream, &mut args)
        }
    })
}

/// Frees a steering; NULL is legal. As blockem_plan_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_steering_free(steering: *mut blockem_steering) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(steering) }
}

/// norms[t] = sqrt(sum_i hidden[t,i]^2), summed in double precision in an order that d alone decides.
/// BLOCK-EM's activation scale is their median over tokens of the base model at the layer.
/// stream: as blockem_encode; on CUDA it runs in the stream's context (for NULL in the thread's current
/// one, or the primary one of the device), whose first such call loads the kernels and may not be
/// captured: CAPTURE_UNSAFE.
/// Errors: as blockem_encode. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_token_norms(
    args: *const blockem_token_norms_args,
    stream: *mut c_void,
) -> blockem_status {
    guard(|| {
        // SAFETY: a sized struct, or NULL; tensors as their comments say.
        unsafe {
            let args = read_struct("args", args)?;
            let (backend, threads) =
                (plan::backend(args.backend)?, plan::num_threads(args.num_threads)?);
            let mut tensors = TokenNormsArgs {
                hidden: args.hidden.required("hidden")?,
                norms: args.norms.required_mut("norms")?,
            };
            let stream = read_stream(tensors.hidden.device, stream)?;
            token_norms(&mut tensors, backend, threads, stream)
        }
    })
}
