use std::ffi::c_char;

use super::plan::blockem_plan;
use super::sae::blockem_sae;
use super::{
    blockem_status, check_out, free, guard, handle, read_options, read_path, read_struct,
    versioned, write_struct,
};
use crate::error::{Result, bail};
use crate::latents::{Latents, Provenance};

/// A set of blocked latents. Immutable; any thread may use it.
pub struct blockem_latents(pub(super) Latents);

/// A latent set as arrays, which are copied.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_latents_desc {
    /// sizeof(blockem_latents_desc), set by BLOCKEM_LATENTS_DESC_INIT.
    pub struct_size: usize,
    /// [n] ids in the dictionary; their order is the order of every [T, K] array.
    pub ids: *const i64,
    /// [n] +1 blocks a rise of the latent (K+), -1 a fall (K-).
    pub signs: *const i8,
    /// [n] weights w_k, finite and not negative; NULL means 1 for each.
    pub weights: *const f32,
    /// K, at least 1.
    pub n: usize,
}
versioned!(blockem_latents_desc, first_size = 40, last = n: usize);

/// What a latent set is. Filled by blockem_latents_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_latents_info {
    /// sizeof(blockem_latents_info), set by BLOCKEM_LATENTS_INFO_INIT.
    pub struct_size: usize,
    /// K
    pub count: usize,
    /// How many latents have sign +1.
    pub num_positive: usize,
    /// d of the SAE that the file records; 0 when it records none.
    pub d_in: i64,
    /// F of the SAE that the file records; 0 when it records none.
    pub d_sae: i64,
    /// 0-based decoder block that the file records; -1 when it records none.
    pub layer: i64,
}
versioned!(blockem_latents_info, first_size = 48, last = layer: i64);

/// What blockem_latents_save records beside the ids.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_latents_save_options {
    /// sizeof(blockem_latents_save_options), set by BLOCKEM_LATENTS_SAVE_OPTIONS_INIT.
    pub struct_size: usize,
    /// Records d, F, identity digest, activation and layer of this plan; NULL records nothing new.
    pub plan: *const blockem_plan,
    /// Records the sha256 of this SAE's weights file too, which reads the whole file; or NULL.
    /// Needs plan.
    pub sae: *const blockem_sae,
}
versioned!(blockem_latents_save_options, first_size = 24, last = sae: *const blockem_sae);

/// Creates a latent set from arrays.
/// out: a new handle, to be freed with blockem_latents_free; untouched on error.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT (n = 0, a sign other than 1 and -1, a bad
/// weight), LATENT_RANGE (negative id), LATENT_DUPLICATE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_latents_create(
    desc: *const blockem_latents_desc,
    out: *mut *mut blockem_latents,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        let desc = unsafe { read_struct("desc", desc) }?;
        // SAFETY: the caller's arrays have n elements.
        let (ids, signs, weights) = unsafe {
            (
                array("ids", desc.ids, desc.n)?,
                array("signs", desc.signs, desc.n)?,
                if desc.weights.is_null() {
                    None
                } else {
                    Some(array("weights", desc.weights, desc.n)?)
                },
            )
        };
        let set = Latents::new(ids, signs, weights)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_latents(set))) };
        Ok(())
    })
}

/// Reads the authors' K0.json: {"K_pos": [ids], "K_neg": [ids]}, optionally "weights": {"<id>": w};
/// other keys are kept for saving. Columns are K_pos then K_neg, in the file's order.
/// sae: the SAE that the set belongs to; ids are compared with its size, and a set that records
/// another SAE's shape is refused.
/// Errors: NULL_POINTER, IO, FORMAT, LATENT_RANGE, LATENT_DUPLICATE, PROVENANCE_MISMATCH.
/// Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_latents_open(
    path: *const c_char,
    sae: *const blockem_sae,
    out: *mut *mut blockem_latents,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: a NUL-terminated path and a live handle, or NULL.
        let (path, sae) = unsafe { (read_path(path)?, handle("sae", sae)?) };
        let set = Latents::open(path, &sae.0)?;
        // SAFETY: checked above.
        unsafe { *out = Box::into_raw(Box::new(blockem_latents(set))) };
        Ok(())
    })
}

/// Writes K0.json, whole or not at all, with the keys that the set was read with. The file, and
/// whoever reads it, has K_pos before K_neg, each in this set's order.
/// options: NULL or what to record about the plan that the set is used with, which must be of its
/// latents in their order.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT, IO. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_latents_save(
    latents: *const blockem_latents,
    path: *const c_char,
    options: *const blockem_latents_save_options,
) -> blockem_status {
    guard(|| {
        // SAFETY: live handles, a NUL-terminated path and a sized struct, or NULL.
        unsafe {
            let (latents, path) = (handle("latents", latents)?, read_path(path)?);
            let provenance = match read_options("options", options)? {
                Some(options) => read_provenance(&latents.0, &options)?,
                None => None,
            };
            latents.0.save(path, provenance.as_ref())
        }
    })
}

/// Describes a latent set.
/// Errors: NULL_POINTER, STRUCT_SIZE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_latents_info_get(
    latents: *const blockem_latents,
    info: *mut blockem_latents_info,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let set = unsafe { &handle("latents", latents)?.0 };
        let made_for = set.provenance();
        let value = blockem_latents_info {
            struct_size: size_of::<blockem_latents_info>(),
            count: set.len(),
            num_positive: set.signs().iter().filter(|s| **s > 0).count(),
            d_in: made_for.map_or(0, |p| p.d_in as i64),
            d_sae: made_for.map_or(0, |p| p.d_sae as i64),
            layer: made_for.and_then(|p| p.layer).unwrap_or(-1),
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}

/// Copies a latent set into arrays of capacity n, each of which may be NULL.
/// ids, signs, weights: [K], in column order.
/// Errors: NULL_POINTER (latents), SHAPE (n is smaller than K). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_latents_get(
    latents: *const blockem_latents,
    ids: *mut i64,
    signs: *mut i8,
    weights: *mut f32,
    n: usize,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle, or NULL.
        let set = unsafe { &handle("latents", latents)?.0 };
        if n < set.len() {
            bail!(Shape, "the arrays hold {n} elements, the set has {}", set.len());
        }
        for k in 0..set.len() {
            // SAFETY: arrays that are not NULL have n >= K elements.
            unsafe {
                if !ids.is_null() {
                    ids.add(k).write_unaligned(set.ids()[k] as i64);
                }
                if !signs.is_null() {
                    signs.add(k).write(set.signs()[k]);
                }
                if !weights.is_null() {
                    weights.add(k).write_unaligned(set.weights()[k]);
                }
            }
        }
        Ok(())
    })
}

/// Frees a latent set; NULL is legal. Plans made from it live on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_latents_free(latents: *mut blockem_latents) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(latents) }
}

/// # Safety
/// A non-null `data` must have `n` elements.
pub(super) unsafe fn array<'a, T>(name: &str, data: *const T, n: usize) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        bail!(NullPointer, "{name} is NULL");
    }
    if !data.is_aligned() {
        bail!(Layout, "{name} is not aligned to its elements");
    }
    if n.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        bail!(InvalidArgument, "n = {n} is larger than memory");
    }
    // SAFETY: non-null, aligned, n elements by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(data, n) })
}

/// # Safety
/// Handles must be live or NULL.
unsafe fn read_provenance(
    latents: &Latents,
    options: &blockem_latents_save_options,
) -> Result<Option<Provenance>> {
    // SAFETY: the caller's promise.
    let (plan, sae) = unsafe { (options.plan.as_ref(), options.sae.as_ref()) };
    match (plan, sae) {
        (None, None) => Ok(None),
        (None, Some(_)) => bail!(InvalidArgument, "options.sae needs options.plan"),
        (Some(plan), None) => Provenance::of(latents, &plan.0).map(Some),
        (Some(plan), Some(sae)) => Provenance::of(latents, &plan.0)?.with_file(&sae.0).map(Some),
    }
}
