use std::ffi::{c_char, c_void};

use super::plan::{blockem_plan_options, device_codes, plan_options};
use super::run::{check_flags, scratch};
use super::sae::blockem_sae;
use super::tensor::blockem_tensor;
use super::{
    blockem_status, check_out, fixed_text, free, guard, handle, read_options, read_stream,
    read_struct, versioned, write_struct,
};
use crate::error::{Result, bail};
use crate::plan::PlanOptions;
use crate::stats::{Stats, StatsArgs};

/// Row of blockem_stats_args.state: sum_t m_t z[t,k].
pub const BLOCKEM_STATS_SUM: i32 = 0;
/// sum_t m_t z[t,k]^2
pub const BLOCKEM_STATS_SQUARE_SUM: i32 = 1;
/// sum_t m_t where z[t,k] is not 0
pub const BLOCKEM_STATS_ACTIVE: i32 = 2;
/// The largest z[t,k] of a token with m_t != 0, whatever its share; minus infinity without one.
pub const BLOCKEM_STATS_MAX: i32 = 3;
/// SUM of the base model's z, as the three that follow.
pub const BLOCKEM_STATS_BASE_SUM: i32 = 4;
/// Its SQUARE_SUM.
pub const BLOCKEM_STATS_BASE_SQUARE_SUM: i32 = 5;
/// Its ACTIVE.
pub const BLOCKEM_STATS_BASE_ACTIVE: i32 = 6;
/// Its MAX.
pub const BLOCKEM_STATS_BASE_MAX: i32 = 7;
/// sum_t m_t relu(z[t,k] - zbase[t,k])^2: what the penalty would be of latent k in K+.
pub const BLOCKEM_STATS_RISE_SQUARE_SUM: i32 = 8;
/// sum_t m_t relu(zbase[t,k] - z[t,k])^2: and in K-.
pub const BLOCKEM_STATS_FALL_SQUARE_SUM: i32 = 9;
/// Rows of a state of one model.
pub const BLOCKEM_STATS_ROWS: i32 = 4;
/// Rows of a state with base_hidden.
pub const BLOCKEM_STATS_ROWS_WITH_BASE: i32 = 10;

/// All latents of an SAE on a device, for sums over tokens. Never changes after creation, so any
/// number of threads may use it at once; the sums are the caller's.
pub struct blockem_stats(Stats);

/// What statistics are of. Filled by blockem_stats_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_stats_info {
    /// sizeof(blockem_stats_info), set by BLOCKEM_STATS_INFO_INIT.
    pub struct_size: usize,
    /// d: columns of hidden.
    pub d_in: i64,
    /// F: columns of the state.
    pub d_sae: i64,
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
    /// blockem_plan_info.identity of a plan of all latents in the dictionary's order: states of one
    /// identity merge.
    pub identity: [c_char; 72],
    /// As blockem_plan_info.numerics: z has the bits of a plan of that name.
    pub numerics: [c_char; 64],
}
versioned!(blockem_stats_info, first_size = 192, last = numerics: [c_char; 64]);

/// Arguments of blockem_stats_update. All tensors belong to the caller, live on the device of the
/// statistics and are only touched until the call's work is done. Rows may be strided; the elements
/// of a row are adjacent. Outputs overlap nothing else.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_stats_args {
    /// sizeof(blockem_stats_args), set by BLOCKEM_STATS_ARGS_INIT.
    pub struct_size: usize,
    /// [T, d] F32, F16 or BF16.
    pub hidden: blockem_tensor,
    /// [T, d] F32, F16 or BF16, optional: the base model's hidden states of the same tokens.
    pub base_hidden: blockem_tensor,
    /// [T] U8 or BOOL (not 0 counts once) or F32 m_t, the token's share; absent means 1 for each
    /// token. With shares of 1 / (tokens of the prompt) sums are those of each prompt's mean.
    pub mask: blockem_tensor,
    /// [BLOCKEM_STATS_ROWS, F] F64, with base_hidden [BLOCKEM_STATS_ROWS_WITH_BASE, F]: the rows
    /// BLOCKEM_STATS_..., written.
    pub state: blockem_tensor,
    /// [1] F64, optional: sum_t m_t.
    pub token_count: blockem_tensor,
    /// 0 overwrites state and token_count; 1 goes on from what they hold.
    pub accumulate: i32,
    /// Zero.
    pub reserved: i32,
    /// Scratch memory on the device of the statistics, starting at a multiple of 64 bytes.
    pub workspace: *mut c_void,
    /// Its bytes; at least what blockem_stats_workspace_size says.
    pub workspace_size: usize,
}
versioned!(blockem_stats_args, first_size = 472, last = workspace_size: usize);

/// Brings every latent of an SAE to a device. Reads the whole encoder once, and keeps it: 4 bytes for
/// each weight on the CPU (8 where it has bf16 dot products, see blockem_stats_info.numerics), 6 on
/// CUDA; a GLU encoder has two matrices of weights. The SAE may be freed.
/// options: as of blockem_plan_create; NULL for the defaults (CPU, native activation, all cores).
/// out: a new handle, to be freed with blockem_stats_free; untouched on error.
/// Errors, contexts and threads: as blockem_plan_create. UNSUPPORTED for partial files, the native
/// activation of a TOPK SAE that selects over a BATCH, and options.part other than
/// BLOCKEM_PART_WHOLE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_stats_create(
    sae: *const blockem_sae,
    options: *const blockem_plan_options,
    out: *mut *mut blockem_stats,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: a live handle and a sized struct, or NULL.
        let (sae, options) = unsafe { (handle("sae", sae)?, read_options("options", options)?) };
        let options = match options {
            Some(options) => plan_options(&options)?,
            None => PlanOptions::default(),
        };
        let stats = Stats::new(&sae.0, &options)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_stats(stats))) };
        Ok(())
    })
}

/// Describes statistics.
/// Errors: NULL_POINTER, STRUCT_SIZE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_stats_info_get(
    stats: *const blockem_stats,
    info: *mut blockem_stats_info,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let stats = unsafe { &handle("stats", stats)?.0 };
        let (device_type, device_index) = device_codes(stats.device());
        let value = blockem_stats_info {
            struct_size: size_of::<blockem_stats_info>(),
            d_in: stats.d_in() as i64,
            d_sae: stats.d_sae() as i64,
            layer: stats.layer().unwrap_or(-1),
            device_type,
            device_index,
            backend: stats.backend() as i32,
            activation: stats.activation() as i32,
            num_threads: stats.num_threads() as i32,
            reserved: 0,
            identity: fixed_text(stats.identity()),
            numerics: fixed_text(&stats.numerics()),
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}

/// Writes the bytes of workspace that blockem_stats_update needs for so many tokens, with base_hidden
/// (has_base 1) or without (0); it may be 0. It hardly grows with the tokens.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (negative tokens, another has_base). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_stats_workspace_size(
    stats: *const blockem_stats,
    tokens: i64,
    has_base: i32,
    bytes: *mut usize,
) -> blockem_status {
    guard(|| {
        check_out("bytes", bytes)?;
        // SAFETY: a live handle, or NULL.
        let stats = unsafe { &handle("stats", stats)?.0 };
        let Ok(tokens) = usize::try_from(tokens) else {
            bail!(InvalidArgument, "tokens is negative: {tokens}");
        };
        if !matches!(has_base, 0 | 1) {
            bail!(InvalidArgument, "has_base is {has_base}; it must be 0 or 1");
        }
        // SAFETY: checked above.
        unsafe { *bytes = stats.workspace_size(tokens, has_base == 1) };
        Ok(())
    })
}

/// Sums over tokens of every latent of the dictionary, without an array [T, F]: for z of hidden, and
/// with base_hidden for the base model's and for the difference. The rows BLOCKEM_STATS_... of state
/// have the formulas.
/// Each sum is one chain in f64, in the order of the tokens: it does not depend on how they are cut
/// into calls, nor on the threads, and z has the bits of blockem_encode. States of several processes
/// merge: the rows MAX to the larger (NaN wins), all others to the sum; a framework's all-reduce
/// will do.
/// The native activation of a TOPK SAE takes two passes over the rows: one for the k-th largest of
/// each token, one for z. A token with m_t = 0 contributes nothing, even if its hidden states are NaN,
/// and costs nothing on the CPU; any other NaN reaches the sums and the maximum. stream, thread-safety: as blockem_encode; calls on one state must follow
/// each other.
/// Errors: as blockem_encode, and WORKSPACE_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_stats_update(
    stats: *const blockem_stats,
    args: *const blockem_stats_args,
    stream: *mut c_void,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle and a sized struct, or NULL; tensors as their comments say.
        unsafe {
            let stats = &handle("stats", stats)?.0;
            let args = read_struct("args", args)?;
            let stream = read_stream(stats.device(), stream)?;
            stats.update_on(stream, &mut stats_args(&args)?)
        }
    })
}

/// Frees statistics; NULL is legal. As blockem_plan_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_stats_free(stats: *mut blockem_stats) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(stats) }
}

/// # Safety
/// Tensors and workspace must be valid for what they say, for 'a.
unsafe fn stats_args<'a>(args: &blockem_stats_args) -> Result<StatsArgs<'a>> {
    check_flags(args.accumulate, args.reserved)?;
    // SAFETY: the caller's promise.
    unsafe {
        Ok(StatsArgs {
            hidden: args.hidden.required("hidden")?,
            base_hidden: args.base_hidden.optional("base_hidden")?,
            mask: args.mask.optional("mask")?,
            state: args.state.required_mut("state")?,
            token_count: args.token_count.optional_mut("token_count")?,
            accumulate: args.accumulate == 1,
            workspace: scratch(args.workspace, args.workspace_size)?,
        })
    }
}
