use std::ffi::{c_char, c_void};

use super::latents::array;
use super::plan::blockem_plan;
use super::tensor::blockem_tensor;
use super::{
    blockem_status, check_out, fixed_text, free, guard, handle, read_path, read_struct, read_text,
    required_text, versioned, write_struct, write_text,
};
use crate::cache::{Cache, CacheOptions, Key, Mode};
use crate::error::{Result, bail};
use crate::sae::Site;
use crate::tensor::DType;

/// Opens a file that is there. Any number of processes at once, while none writes.
pub const BLOCKEM_CACHE_MODE_READ: i32 = 0;
/// Opens a file that is there, for this process alone.
pub const BLOCKEM_CACHE_MODE_WRITE: i32 = 1;
/// As WRITE; makes the file if it is not there.
pub const BLOCKEM_CACHE_MODE_CREATE: i32 = 2;

/// Bytes of an example's key.
pub const BLOCKEM_CACHE_KEY_SIZE: i32 = 32;

/// A reference cache: z of the base model at blocked latents, per example, in one file. Any number
/// of threads may use a handle; calls that write take turns. A handle belongs to the process that
/// opened it: in a child of fork calls answer FORKED.
pub struct blockem_cache(Cache);

/// How a cache is opened, and what is expected of it: what differs from the file is CACHE_STALE.
/// A new file needs all of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_cache_options {
    /// sizeof(blockem_cache_options), set by BLOCKEM_CACHE_OPTIONS_INIT.
    pub struct_size: usize,
    /// BLOCKEM_CACHE_MODE_...
    pub mode: i32,
    /// BLOCKEM_DTYPE_... of the hidden states that are encoded; -1 (by _INIT) expects nothing.
    pub hidden_dtype: i32,
    /// 0-based decoder block in which the site lies; -1 (by _INIT) takes the plan's. Of a plan whose
    /// SAE says nothing, the block whose output is encoded.
    pub layer: i64,
    /// Names the base model's weights in 1 to 255 bytes of UTF-8, by name and revision or better by
    /// a digest; NULL expects nothing.
    pub base_model: *const c_char,
    /// Gives the numerics; with READ a cache that has z only of other latents is stale, too. NULL
    /// expects nothing.
    pub plan: *const blockem_plan,
    /// BLOCKEM_SITE_... where hidden states are read; 0 takes the plan's.
    pub site: i32,
    /// Zero.
    pub reserved: i32,
}
versioned!(blockem_cache_options, first_size = 40, last = reserved: i32);

/// What a cache is. Filled by blockem_cache_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_cache_info {
    /// sizeof(blockem_cache_info), set by BLOCKEM_CACHE_INFO_INIT.
    pub struct_size: usize,
    /// Examples of which any z is stored.
    pub num_examples: i64,
    /// Latents of which any z is stored.
    pub num_columns: i64,
    /// 0-based decoder block in which the site lies; -1 for the embedding.
    pub layer: i64,
    /// BLOCKEM_DTYPE_... of the hidden states that were encoded.
    pub hidden_dtype: i32,
    /// BLOCKEM_SITE_... where hidden states were read.
    pub site: i32,
    /// The name that the base model's weights were given.
    pub base_model: [c_char; 256],
    /// blockem_plan_info.numerics of the plans that encoded.
    pub numerics: [c_char; 64],
}
versioned!(blockem_cache_info, first_size = 360, last = numerics: [c_char; 64]);

/// Opens a reference cache.
/// The file belongs to one base model, site, dtype of hidden and numerics. It survives a process
/// that is killed at any moment: what a call stored before it returned is there, and the next writer
/// goes on. A reader that finds such a file may have to repair it, for which it needs to be able to
/// write it.
/// path: a file; CREATE makes a missing one, which takes its name when it is complete.
/// options: required; see blockem_cache_options.
/// out: a new handle, to be freed with blockem_cache_free; untouched on error.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT, DTYPE, IO, FORMAT (no cache, or damaged),
/// UNSUPPORTED (of another format: make a new one), CACHE_STALE (the message has both sides), CACHE_BUSY (a writer
/// has it, or this one would write and readers have it). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_open(
    path: *const c_char,
    options: *const blockem_cache_options,
    out: *mut *mut blockem_cache,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: a NUL-terminated path and a sized struct, or NULL.
        let (path, options) = unsafe { (read_path(path)?, read_struct("options", options)?) };
        // SAFETY: a NUL-terminated name and a live plan, or NULL.
        let cache = Cache::open(path, &unsafe { cache_options(&options) }?)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_cache(cache))) };
        Ok(())
    })
}

/// Describes a cache.
/// Errors: NULL_POINTER, STRUCT_SIZE, IO, FORMAT (damaged), FORKED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_info_get(
    cache: *const blockem_cache,
    info: *mut blockem_cache_info,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let cache = unsafe { &handle("cache", cache)?.0 };
        let (identity, counts) = (cache.identity(), cache.counts()?);
        let value = blockem_cache_info {
            struct_size: size_of::<blockem_cache_info>(),
            num_examples: counts.examples as i64,
            num_columns: counts.columns as i64,
            layer: identity.layer.unwrap_or(-1),
            hidden_dtype: identity.dtype as i32,
            site: identity.site as i32,
            base_model: fixed_text(&identity.base_model),
            numerics: fixed_text(&identity.numerics),
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}

/// What the base model sees of an example.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_cache_example {
    /// sizeof(blockem_cache_example), set by BLOCKEM_CACHE_EXAMPLE_INIT.
    pub struct_size: usize,
    /// [num_tokens] of the tokens whose z is stored (without padding).
    pub token_ids: *const i64,
    /// [num_tokens] as the model gets them; NULL means 0, 1, 2, ...
    pub positions: *const i64,
    /// At least 1.
    pub num_tokens: usize,
    /// [context_size] bytes, or NULL with 0 for a model that sees tokens and positions alone. It must
    /// tell apart all else that changes hidden states of the example: pixels of its images and their
    /// grids, audio features and their masks, token types, positions in more than one dimension, gaps
    /// that an attention mask leaves between its tokens. The bytes themselves will do, or a digest of
    /// them; whoever reads must make them as whoever stored, dtype included.
    pub context: *const c_void,
    /// Bytes of context.
    pub context_size: usize,
}
versioned!(blockem_cache_example, first_size = 48, last = context_size: usize);

/// The key of an example: a digest of what the cache belongs to, the token ids, their positions and
/// the context.
/// example: required; see blockem_cache_example.
/// key: [BLOCKEM_CACHE_KEY_SIZE] bytes, written.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT (no tokens), LAYOUT. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_key(
    cache: *const blockem_cache,
    example: *const blockem_cache_example,
    key: *mut u8,
) -> blockem_status {
    guard(|| {
        check_out("key", key)?;
        // SAFETY: a live handle and a sized struct, or NULL.
        let (cache, example) =
            unsafe { (&handle("cache", cache)?.0, read_struct("example", example)?) };
        let (n, positions) = (example.num_tokens, example.positions);
        // SAFETY: arrays of n elements, context_size bytes.
        let (token_ids, positions, context) = unsafe {
            (
                array("token_ids", example.token_ids, n)?,
                if positions.is_null() { None } else { Some(array("positions", positions, n)?) },
                array("context", example.context.cast::<u8>(), example.context_size)?,
            )
        };
        let digest = cache.example_key(token_ids, positions, context)?;
        // SAFETY: the caller's key has 32 bytes.
        unsafe { key.cast::<Key>().write(digest) };
        Ok(())
    })
}

/// blockem_cache_key of an example without context: of a model that sees tokens and positions alone.
/// token_ids: [n], n at least 1, of the tokens whose z is stored (without padding).
/// positions: [n] as the model gets them; NULL means 0, 1, 2, ...
/// key: [BLOCKEM_CACHE_KEY_SIZE] bytes, written.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (n = 0), LAYOUT. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_example_key(
    cache: *const blockem_cache,
    token_ids: *const i64,
    positions: *const i64,
    n: usize,
    key: *mut u8,
) -> blockem_status {
    let example = blockem_cache_example {
        struct_size: size_of::<blockem_cache_example>(),
        token_ids,
        positions,
        num_tokens: n,
        context: std::ptr::null(),
        context_size: 0,
    };
    // SAFETY: the caller's promise.
    unsafe { blockem_cache_key(cache, &example, key) }
}

/// Keeps a short text beside the examples, such as how their contexts were made. It is written once:
/// the same again changes nothing, another is CACHE_STALE.
/// name: 1 to 255 bytes of UTF-8.
/// text: up to 65536 bytes of UTF-8.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (opened with READ; name or text has another length),
/// CACHE_STALE, IO, FORMAT (damaged), FORKED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_put_note(
    cache: *const blockem_cache,
    name: *const c_char,
    text: *const c_char,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle and NUL-terminated texts, or NULL.
        let (cache, name, text) = unsafe {
            (&handle("cache", cache)?.0, required_text("name", name)?, required_text("text", text)?)
        };
        cache.put_note(name, text)
    })
}

/// Reads what blockem_cache_put_note stored.
/// buf: at most cap bytes are written, with the final NUL; buf NULL or cap 0 writes nothing.
/// length: written: bytes of the text without the NUL, so that a second call can bring a larger
/// buffer. 0 where there is no such note.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (the name's length), IO, FORMAT (damaged), FORKED.
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_get_note(
    cache: *const blockem_cache,
    name: *const c_char,
    buf: *mut c_char,
    cap: usize,
    length: *mut usize,
) -> blockem_status {
    guard(|| {
        check_out("length", length)?;
        // SAFETY: a live handle and a NUL-terminated name, or NULL.
        let (cache, name) = unsafe { (&handle("cache", cache)?.0, required_text("name", name)?) };
        let text = cache.note(name)?.unwrap_or_default();
        // SAFETY: the caller's buffer has cap bytes; length was checked.
        unsafe { *length = write_text(&text, buf, cap) };
        Ok(())
    })
}

/// Which examples lack which latents of a plan.
/// keys: [n, BLOCKEM_CACHE_KEY_SIZE] bytes.
/// missing: [n, K] bytes, written: 1 where z of the latent is not stored for the example, else 0.
/// Errors: NULL_POINTER, INVALID_ARGUMENT, CACHE_STALE (the plan's layer or numerics are not the
/// cache's), IO, FORMAT (damaged), FORKED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_missing(
    cache: *const blockem_cache,
    plan: *const blockem_plan,
    keys: *const u8,
    n: usize,
    missing: *mut u8,
) -> blockem_status {
    guard(|| {
        // SAFETY: live handles or NULL; n keys.
        let (cache, plan, keys) = unsafe {
            (&handle("cache", cache)?.0, &handle("plan", plan)?.0, array("keys", keys.cast(), n)?)
        };
        if n > 0 {
            check_out("missing", missing)?;
        }
        for (i, absent) in cache.missing(plan, keys)?.into_iter().enumerate() {
            // SAFETY: the caller's array has n K bytes.
            unsafe { missing.add(i).write(absent.into()) };
        }
        Ok(())
    })
}

/// Stores z of examples, all of them or none; on the disk when the call returns. What is there stays
/// as it is: each z is stored once, and latents that are new are added to examples that are there.
/// A call costs a wait for the disk, so bring a batch at a time.
/// keys: [n, BLOCKEM_CACHE_KEY_SIZE] bytes.
/// latents: [n] tensors [T_i, K] F32 on the host, any strides: blockem_encode of the base model's
/// hidden states; T_i is the number of the example's tokens.
/// written: how many columns were new; or NULL.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (opened with READ), SHAPE, DTYPE, DEVICE_MISMATCH,
/// NON_FINITE, CACHE_STALE, IO (also a full disk: what was stored before stays, and the handle is to
/// be opened again), FORMAT (damaged), FORKED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_put(
    cache: *const blockem_cache,
    plan: *const blockem_plan,
    keys: *const u8,
    latents: *const blockem_tensor,
    n: usize,
    written: *mut u64,
) -> blockem_status {
    guard(|| {
        // SAFETY: live handles or NULL; n keys and n tensors.
        let (cache, plan, keys, latents) = unsafe {
            (
                &handle("cache", cache)?.0,
                &handle("plan", plan)?.0,
                array::<Key>("keys", keys.cast(), n)?,
                array("latents", latents, n)?,
            )
        };
        if !written.is_null() {
            check_out("written", written)?;
        }
        let name = |i: usize| format!("latents[{i}]");
        // SAFETY: the caller's tensors are readable.
        let read = latents.iter().enumerate().map(|(i, z)| unsafe { z.required(&name(i)) });
        let count = cache.put(plan, keys, &read.collect::<Result<Vec<_>>>()?)?;
        if !written.is_null() {
            // SAFETY: checked above.
            unsafe { *written = count };
        }
        Ok(())
    })
}

/// Reads z of examples: the bits that were stored.
/// keys: [n, BLOCKEM_CACHE_KEY_SIZE] bytes.
/// latents: [n] tensors [T_i, K] F32 on the host, any strides, written; T_i is the number of the
/// example's tokens. Nothing is written unless all are there and sound.
/// Errors: NULL_POINTER, SHAPE, DTYPE, DEVICE_MISMATCH, CACHE_MISS (the message names the first
/// example that is not there, or its missing latents), CACHE_STALE (the plan's layer or numerics are
/// not the cache's, or it has only others than the plan's latents), IO, FORMAT (damaged), FORKED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_get(
    cache: *const blockem_cache,
    plan: *const blockem_plan,
    keys: *const u8,
    latents: *const blockem_tensor,
    n: usize,
) -> blockem_status {
    guard(|| {
        // SAFETY: live handles or NULL; n keys and n tensors.
        let (cache, plan, keys, latents) = unsafe {
            (
                &handle("cache", cache)?.0,
                &handle("plan", plan)?.0,
                array::<Key>("keys", keys.cast(), n)?,
                array("latents", latents, n)?,
            )
        };
        let name = |i: usize| format!("latents[{i}]");
        // SAFETY: the caller's tensors are writable and apart from each other.
        let views = latents.iter().enumerate().map(|(i, z)| unsafe { z.required_mut(&name(i)) });
        cache.get(plan, keys, &mut views.collect::<Result<Vec<_>>>()?)
    })
}

/// Closes a cache; NULL is legal. Nothing is lost by it or without it: what was put is on the disk.
/// No call may still be using it. In a child of fork the file stays open for the parent.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_cache_free(cache: *mut blockem_cache) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(cache) }
}

/// # Safety
/// base_model must be a NUL-terminated string and plan a live handle, or NULL.
unsafe fn cache_options<'a>(options: &blockem_cache_options) -> Result<CacheOptions<'a>> {
    let Some(mode) = Mode::from_code(options.mode) else {
        bail!(InvalidArgument, "there is no cache mode {}", options.mode);
    };
    let dtype = match (options.hidden_dtype, DType::from_code(options.hidden_dtype)) {
        (-1, _) => None,
        (_, Some(dtype)) => Some(dtype),
        (code, None) => bail!(Dtype, "options.hidden_dtype is the unknown dtype {code}"),
    };
    let Some(site) = Site::ALL.into_iter().find(|site| *site as i32 == options.site) else {
        bail!(InvalidArgument, "options.site is {}, which is no BLOCKEM_SITE_...", options.site);
    };
    if options.reserved != 0 {
        bail!(InvalidArgument, "options.reserved is not zero");
    }
    // SAFETY: the caller's promise.
    let (base_model, plan) =
        unsafe { (read_text("options.base_model", options.base_model)?, options.plan.as_ref()) };
    Ok(CacheOptions {
        mode,
        base_model,
        site,
        layer: (options.layer != -1).then_some(options.layer),
        dtype,
        plan: plan.map(|plan| &*plan.0),
    })
}
