use std::ffi::c_char;

use super::latents::array;
use super::mask::{blockem_mask_options, mask_options, read_utf8, write_array};
use super::{blockem_status, check_out, free, guard, handle, read_path};
use crate::error::bail;
use crate::tokenizer::Tokenizer;

/// A tokenizer, of the file tokenizer.json. Immutable; any thread may use it, and a child of fork.
pub struct blockem_tokenizer(Tokenizer);

/// Opens a tokenizer.json (that of Hugging Face's tokenizers library), or a folder with one. Its
/// truncation and padding are left aside.
/// The file may have 64 MiB; it is read whole and takes some thirty times as much memory for a
/// moment. Its regular expressions and replacements decide what a text costs: open files that you
/// trust as you trust the model's.
/// out: a new handle, to be freed with blockem_tokenizer_free; untouched on error.
/// Errors: NULL_POINTER, IO (also a folder without a tokenizer.json), FORMAT (no tokenizer.json, or
/// one that this library cannot follow; a folder with tokenizer.model or tekken.json alone, and the
/// message says how to write a tokenizer.json),
/// UNSUPPORTED (a build without the cargo feature tokenizers). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_tokenizer_open(
    path: *const c_char,
    out: *mut *mut blockem_tokenizer,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: a NUL-terminated path, or NULL.
        let tokenizer = Tokenizer::open(unsafe { read_path(path) }?)?;
        // SAFETY: checked above.
        unsafe { put(tokenizer, out) };
        Ok(())
    })
}

/// As blockem_tokenizer_open, from the contents of such a file.
/// json: [json_len] bytes, which need not live on.
/// Errors: NULL_POINTER, FORMAT, UNSUPPORTED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_tokenizer_from_json(
    json: *const c_char,
    json_len: usize,
    out: *mut *mut blockem_tokenizer,
) -> blockem_status {
    guard(|| {
        check_out("out", out)?;
        // SAFETY: json_len bytes.
        let json = unsafe { array("json", json.cast::<u8>(), json_len) }?;
        let tokenizer = Tokenizer::from_json(json)?;
        // SAFETY: checked above.
        unsafe { put(tokenizer, out) };
        Ok(())
    })
}

/// The tokens of a text with the mask of the assistant's.
/// text: [text_len] bytes of UTF-8, without a final NUL, 16 MiB at most: a rendered conversation.
/// options: required; where the assistant's text is, and which tokens are made.
/// ids, mask: [capacity] token ids, and bytes that are 1 where the token is the assistant's, else
/// 0; the first num_tokens are written. NULL for what is not wanted.
/// num_tokens: written. A capacity of text_len and a few more holds almost every text; with ids and
/// mask NULL the call tells the number alone.
/// A token is marked where any byte of the text that it stands for is the assistant's (see
/// options.border). Of an added token that takes the white space beside it, its own text counts.
/// Tokens that the tokenizer puts around a text are never marked.
/// Errors: as blockem_mask_from_offsets; also SHAPE (capacity), INVALID_ARGUMENT (max_tokens below
/// the number of added tokens), FORMAT (the tokenizer cannot take the text), UNSUPPORTED
/// (add_special_tokens of a tokenizer that changes more). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_tokenizer_mask(
    tokenizer: *const blockem_tokenizer,
    text: *const c_char,
    text_len: usize,
    options: *const blockem_mask_options,
    ids: *mut i64,
    mask: *mut u8,
    capacity: usize,
    num_tokens: *mut usize,
) -> blockem_status {
    guard(|| {
        check_out("num_tokens", num_tokens)?;
        if !ids.is_null() {
            check_out("ids", ids)?;
        }
        // SAFETY: a live handle, the caller's text and struct, or NULL.
        let (tokenizer, text, (options, tokens)) = unsafe {
            (&handle("tokenizer", tokenizer)?.0, read_utf8(text, text_len)?, mask_options(options)?)
        };
        let masked = tokenizer.mask(text, &options, tokens)?;
        let n = masked.ids.len();
        if n > capacity && !(ids.is_null() && mask.is_null()) {
            bail!(Shape, "the text has {n} tokens, capacity is {capacity}");
        }
        // SAFETY: arrays that are not NULL have capacity >= n elements.
        unsafe {
            write_array(&masked.ids, ids);
            write_array(&masked.mask, mask);
            *num_tokens = n;
        }
        Ok(())
    })
}

/// The mask of a trainer's own tokens of a text, which must be those that blockem_tokenizer_mask
/// makes of it with these options.
/// ids: [n], without padding.
/// mask: [n] bytes, written.
/// Errors: as blockem_tokenizer_mask; also MASK_UNALIGNED (the ids are not those of the text; the
/// message names the first position). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_tokenizer_mask_ids(
    tokenizer: *const blockem_tokenizer,
    text: *const c_char,
    text_len: usize,
    options: *const blockem_mask_options,
    ids: *const i64,
    n: usize,
    mask: *mut u8,
) -> blockem_status {
    guard(|| {
        if n > 0 {
            check_out("mask", mask)?;
        }
        // SAFETY: a live handle, the caller's text, struct and n ids, or NULL.
        let (tokenizer, text, (options, tokens), ids) = unsafe {
            (
                &handle("tokenizer", tokenizer)?.0,
                read_utf8(text, text_len)?,
                mask_options(options)?,
                array("ids", ids, n)?,
            )
        };
        let marks = tokenizer.mask_ids(text, &options, tokens, ids)?;
        // SAFETY: the caller's mask has n bytes, as many as there are marks.
        unsafe { write_array(&marks, mask) };
        Ok(())
    })
}

/// Frees a tokenizer; NULL is legal.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_tokenizer_free(tokenizer: *mut blockem_tokenizer) {
    // SAFETY: a handle of ours that is not used again, or NULL.
    unsafe { free(tokenizer) }
}

/// # Safety
/// out must be writable.
unsafe fn put(tokenizer: Tokenizer, out: *mut *mut blockem_tokenizer) {
    // SAFETY: the caller's promise.
    unsafe { *out = Box::into_raw(Box::new(blockem_tokenizer(tokenizer))) };
}

#[cfg(all(test, not(feature = "tokenizers")))]
mod tests {
    use super::*;
    use crate::capi::status::BLOCKEM_STATUS_UNSUPPORTED;

    #[test]
    fn a_build_without_the_feature_says_so() {
        let mut out = std::ptr::null_mut();
        // SAFETY: a NUL-terminated path, two bytes of JSON and room for the handle.
        unsafe {
            let status = blockem_tokenizer_open(c"tokenizer.json".as_ptr(), &mut out);
            assert_eq!(status, BLOCKEM_STATUS_UNSUPPORTED);
            let status = blockem_tokenizer_from_json(c"{}".as_ptr(), 2, &mut out);
            assert_eq!(status, BLOCKEM_STATUS_UNSUPPORTED);
        }
        assert!(out.is_null());
    }
}
