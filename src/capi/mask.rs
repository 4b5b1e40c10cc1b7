use std::ffi::c_char;

use super::latents::array;
use super::{blockem_status, check_out, guard, read_struct, read_text, versioned};
use crate::error::{Result, bail};
use crate::mask::{self, Border, Closing, Markers, MaskOptions, Span, Turns};
use crate::tokenizer::TokenOptions;

/// The end marker is part of the assistant's text, which so learns to stop.
pub const BLOCKEM_CLOSING_INCLUDE: i32 = 0;
/// The assistant's text ends before the end marker.
pub const BLOCKEM_CLOSING_EXCLUDE: i32 = 1;

/// A token that lies partly in the assistant's text is marked: who writes the text writes it.
pub const BLOCKEM_BORDER_INCLUDE: i32 = 0;
/// It is not marked.
pub const BLOCKEM_BORDER_EXCLUDE: i32 = 1;
/// It is an error, MASK_UNALIGNED.
pub const BLOCKEM_BORDER_REFUSE: i32 = 2;

/// Where the assistant's text is in a rendered conversation: in spans, which the caller knows from
/// rendering it, or between the markers of a chat template. Text is UTF-8 and counted in bytes.
/// Markers are found wherever they stand, also in a user's message: turn_marker finds most of
/// those, and spans are for text that is not trusted.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_mask_options {
    /// sizeof(blockem_mask_options), set by BLOCKEM_MASK_OPTIONS_INIT.
    pub struct_size: usize,
    /// [num_spans, 2] begin and end (excluded) of the assistant's text, ascending, not overlapping,
    /// an end marker within them or not as it should be marked; NULL when markers are given. Not
    /// NULL with num_spans 0 says that there is none.
    pub spans: *const i64,
    pub num_spans: usize,
    /// What comes before the assistant's text, such as "<|im_start|>assistant\n"; NULL with spans.
    pub start_marker: *const c_char,
    /// What comes after it, such as "<|im_end|>"; NULL with spans.
    pub end_marker: *const c_char,
    /// What the turns of every role begin with, such as "<|im_start|>" (start_marker begins with
    /// it): a turn that opens within another's is then MASK_UNALIGNED, whosever they are. NULL
    /// looks at the assistant's turns alone.
    pub turn_marker: *const c_char,
    /// What the template itself puts at the beginning of some answers, such as
    /// "<think>\n\n</think>\n\n": it is not the assistant's. NULL for nothing.
    pub injected: *const c_char,
    /// BLOCKEM_CLOSING_..., for markers.
    pub closing: i32,
    /// BLOCKEM_BORDER_...
    pub border: i32,
    /// 1: the last turn may lack its end marker, and then goes up to the end of the text. 0: that
    /// is MASK_UNALIGNED.
    pub allow_unclosed: i32,
    /// 1: a mask that marks nothing is an answer. 0: it is MASK_EMPTY.
    pub allow_empty: i32,
    /// 1: the tokenizer puts its own tokens around the text, such as BOS, which are never marked. 0
    /// for what a chat template wrote.
    pub add_special_tokens: i32,
    /// Zero.
    pub reserved: i32,
    /// Keeps so many tokens from the beginning, the added ones among them; 0 keeps all.
    pub max_tokens: i64,
}
versioned!(blockem_mask_options, first_size = 88, last = max_tokens: i64);

/// The mask of tokens whose places in the text are known, from any tokenizer. A token is marked
/// where any byte that it stands for is the assistant's (options.border decides on those of which
/// others are not).
/// text: [text_len] bytes of UTF-8, without a final NUL, 16 MiB at most.
/// options: required; without add_special_tokens and max_tokens, which are a tokenizer's.
/// offsets: [n, 2] begin and end (excluded) of the bytes that each token stands for, before white
/// space is trimmed; equal where it stands for none, as BOS does: such a token is never marked.
/// mask: [n] bytes, written: 1 where the token is the assistant's, else 0.
/// Errors: NULL_POINTER, STRUCT_SIZE, INVALID_ARGUMENT (text that is not UTF-8; spans that overlap,
/// leave the text or cut a character; offsets beyond it; unknown options), MASK_EMPTY (nothing is
/// marked), MASK_UNALIGNED (a turn without an end marker or with another within it; a token across
/// a border where that is refused). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_mask_from_offsets(
    text: *const c_char,
    text_len: usize,
    options: *const blockem_mask_options,
    offsets: *const i64,
    n: usize,
    mask: *mut u8,
) -> blockem_status {
    guard(|| {
        // SAFETY: the caller's text, struct, spans, markers and [n, 2] array.
        let (text, (options, tokens), offsets) = unsafe {
            (read_utf8(text, text_len)?, mask_options(options)?, spans("offsets", offsets, n)?)
        };
        if tokens != TokenOptions::default() {
            bail!(
                InvalidArgument,
                "options.add_special_tokens and options.max_tokens are a tokenizer's; offsets are \
                 of the tokens as they are"
            );
        }
        if n > 0 {
            check_out("mask", mask)?;
        }
        let marks = mask::mask_from_offsets(text, &options, &offsets)?;
        // SAFETY: the caller's mask has n bytes, as many as there are marks.
        unsafe { write_array(&marks, mask) };
        Ok(())
    })
}

/// Copies into the caller's array, which may be NULL: then nothing is wanted.
///
/// # Safety
/// A non-null `to` must have room for the values.
pub(super) unsafe fn write_array<T: Copy>(values: &[T], to: *mut T) {
    if !to.is_null() {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
    }
}

/// # Safety
/// As blockem_mask_options says of its pointers.
pub(super) unsafe fn mask_options<'a>(
    options: *const blockem_mask_options,
) -> Result<(MaskOptions<'a>, TokenOptions)> {
    // SAFETY: the caller's promise.
    let options = unsafe { read_struct("options", options) }?;
    // SAFETY: the caller's promise.
    let turns = unsafe { turns(&options) }?;
    let Some(border) = Border::from_code(options.border) else {
        bail!(InvalidArgument, "there is no border {}", options.border);
    };
    let max_tokens = match usize::try_from(options.max_tokens) {
        Ok(0) => None,
        Ok(most) => Some(most),
        Err(_) => bail!(InvalidArgument, "options.max_tokens is {}", options.max_tokens),
    };
    if options.reserved != 0 {
        bail!(InvalidArgument, "options.reserved is {}; expected 0", options.reserved);
    }
    let allow_empty = flag("options.allow_empty", options.allow_empty)?;
    let add_special_tokens = flag("options.add_special_tokens", options.add_special_tokens)?;
    Ok((
        MaskOptions { turns, border, allow_empty },
        TokenOptions { add_special_tokens, max_tokens },
    ))
}

/// # Safety
/// As [`mask_options`].
unsafe fn turns<'a>(options: &blockem_mask_options) -> Result<Turns<'a>> {
    // SAFETY: the caller's promise.
    let (turn, injected) = unsafe {
        (
            read_text("options.turn_marker", options.turn_marker)?,
            read_text("options.injected", options.injected)?,
        )
    };
    let Some(closing) = Closing::from_code(options.closing) else {
        bail!(InvalidArgument, "there is no closing {}", options.closing);
    };
    let allow_unclosed = flag("options.allow_unclosed", options.allow_unclosed)?;
    if !options.spans.is_null() {
        if !options.start_marker.is_null() || !options.end_marker.is_null() {
            bail!(InvalidArgument, "options have spans and markers; give one of them");
        }
        if turn.or(injected).is_some() || closing != Closing::default() || allow_unclosed {
            bail!(
                InvalidArgument,
                "options.turn_marker, injected, closing and allow_unclosed belong to markers; \
                 spans say it themselves"
            );
        }
        // SAFETY: the caller's promise.
        return Ok(Turns::Spans(unsafe {
            spans("options.spans", options.spans, options.num_spans)
        }?));
    }
    if options.num_spans > 0 {
        bail!(NullPointer, "options.spans is NULL");
    }
    // SAFETY: the caller's promise.
    let markers = unsafe {
        (
            read_text("options.start_marker", options.start_marker)?,
            read_text("options.end_marker", options.end_marker)?,
        )
    };
    let (Some(start), Some(end)) = markers else {
        bail!(
            InvalidArgument,
            "options do not say where the assistant's text is: give spans, or start_marker and \
             end_marker"
        );
    };
    Ok(Turns::Markers(Markers { start, end, turn, injected, closing, allow_unclosed }))
}

/// # Safety
/// A non-null `text` must have `len` bytes.
pub(super) unsafe fn read_utf8<'a>(text: *const c_char, len: usize) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { array("text", text.cast::<u8>(), len) }?;
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(e) => bail!(InvalidArgument, "text is not UTF-8 at byte {}", e.valid_up_to()),
    }
}

/// # Safety
/// A non-null `data` must have 2 n elements.
unsafe fn spans(name: &str, data: *const i64, n: usize) -> Result<Vec<Span>> {
    // SAFETY: the caller's promise.
    let pairs = unsafe { array(name, data.cast::<[i64; 2]>(), n) }?;
    let span = |(i, [start, end]): (usize, &[i64; 2])| match (
        usize::try_from(*start),
        usize::try_from(*end),
    ) {
        (Ok(start), Ok(end)) => Ok(start..end),
        _ => bail!(InvalidArgument, "{name}[{i}] is {start}..{end}"),
    };
    pairs.iter().enumerate().map(span).collect()
}

fn flag(name: &str, value: i32) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => bail!(InvalidArgument, "{name} is {value}; expected 0 or 1"),
    }
}
