use std::ffi::{CString, c_char};
use std::sync::OnceLock;

use super::latents::array;
use super::{blockem_status, check_out, guard, read_struct, read_text, versioned, write_struct};
use crate::error::{Result, bail};
use crate::mask::{
    self, Border, Closing, Markers, MaskOptions, OtherTurns, PRESETS, Span, Texts, Turns,
};
use crate::tokenizer::TokenOptions;

/// The end marker is part of the assistant's text, which so learns to stop.
pub const BLOCKEM_CLOSING_INCLUDE: i32 = 0;
/// The assistant's text ends before the end marker.
pub const BLOCKEM_CLOSING_EXCLUDE: i32 = 1;

/// Closed, where their turn marker is what a start marker begins with; else open.
pub const BLOCKEM_OTHER_TURNS_AUTO: i32 = 0;
/// Other roles' turns are closed by an end marker, as the assistant's: another turn that opens
/// within one is MASK_UNALIGNED, because a message then holds a marker.
pub const BLOCKEM_OTHER_TURNS_CLOSED: i32 = 1;
/// Other roles' turns end where the next turn begins, as in DeepSeek, GLM and Mistral: an end marker
/// within one is MASK_UNALIGNED.
pub const BLOCKEM_OTHER_TURNS_OPEN: i32 = 2;

/// A token that lies partly in the assistant's text is marked: who writes the text writes it.
pub const BLOCKEM_BORDER_INCLUDE: i32 = 0;
/// It is not marked.
pub const BLOCKEM_BORDER_EXCLUDE: i32 = 1;
/// It is an error, MASK_UNALIGNED.
pub const BLOCKEM_BORDER_REFUSE: i32 = 2;

/// Where the assistant's text is in a rendered conversation: in spans, which the caller knows from
/// rendering it, or between the markers of a chat template, which blockem_mask_preset knows for
/// common ones. Text is UTF-8 and counted in bytes. Where several markers stand at one place, the
/// longest counts. Markers are found wherever they stand, also in a user's message: turn markers
/// find most of those, and spans are for text that is not trusted.
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
    /// What comes before the assistant's text, such as "<|im_start|>assistant\n"; it is never
    /// marked. NULL with spans or start_markers.
    pub start_marker: *const c_char,
    /// What comes after it, such as "<|im_end|>"; NULL with spans or end_markers.
    pub end_marker: *const c_char,
    /// What the turns of other roles, or of every role, begin with, such as "<|im_start|>": a turn
    /// that opens within the assistant's is MASK_UNALIGNED, so that a tool's reply is never the
    /// assistant's. With NULL here and in turn_markers it is derived from the start markers: the
    /// bracketed word before the role's name ("<|im_start|>" of "<|im_start|>assistant\n"), or the
    /// word with another role's name ("<|user|>", "<|tool|>", ... of "<|assistant|>").
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
    /// BLOCKEM_OTHER_TURNS_..., for markers.
    pub other_turns: i32,
    /// Keeps so many tokens from the beginning, the added ones among them; 0 keeps all.
    pub max_tokens: i64,
    /// [num_start_markers] several in place of start_marker, where the assistant also goes on after
    /// a tool's reply; NULL with start_marker or spans.
    pub start_markers: *const *const c_char,
    pub num_start_markers: usize,
    /// [num_end_markers] several in place of end_marker, such as "<|end|>", "<|call|>" and
    /// "<|return|>": the first that comes closes the turn. One may be what begins the next turn, as
    /// "<|user|>" in GLM. NULL with end_marker or spans.
    pub end_markers: *const *const c_char,
    pub num_end_markers: usize,
    /// [num_turn_markers] several in place of turn_marker; not NULL with num_turn_markers 0 looks
    /// at the assistant's turns alone.
    pub turn_markers: *const *const c_char,
    pub num_turn_markers: usize,
    /// [num_injected_texts] several in place of injected: the longest that a turn begins with is not
    /// the assistant's. NULL for none.
    pub injected_texts: *const *const c_char,
    pub num_injected_texts: usize,
}
versioned!(blockem_mask_options, first_size = 88, last = num_injected_texts: usize);

/// Sets the markers of a common chat template in options: start_markers, end_markers, turn_markers,
/// other_turns, closing and allow_unclosed. They point to memory that lives as long as the library;
/// the caller may change them afterwards. Whether injected text is to be left out depends on how a
/// text was rendered: options.injected stays as it is.
/// name: "chatml" (also "qwen"), "harmony" (also "gpt-oss"), "llama3", "deepseek", "glm4", "gemma",
/// "gemma4", "phi3" (also "phi"), "mistral" or "cohere".
/// options: initialised by BLOCKEM_MASK_OPTIONS_INIT, without spans and other markers.
/// Errors: NULL_POINTER, STRUCT_SIZE (also a caller compiled for a libblockem without these fields),
/// INVALID_ARGUMENT (an unknown name, or options with spans or markers). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_mask_preset(
    name: *const c_char,
    options: *mut blockem_mask_options,
) -> blockem_status {
    guard(|| {
        // SAFETY: the caller's string and struct, or NULL.
        let (name, mut given) =
            unsafe { (read_text("name", name)?, read_struct("options", options)?) };
        let Some(name) = name else { bail!(NullPointer, "name is NULL") };
        if given.struct_size < size_of::<blockem_mask_options>() {
            bail!(
                StructSize,
                "options has {} bytes, which have no room for several markers; compile with this \
                 library's header",
                given.struct_size
            );
        }
        let singles = [given.start_marker, given.end_marker, given.turn_marker];
        let several = [given.start_markers, given.end_markers, given.turn_markers];
        let has_markers =
            singles.iter().any(|p| !p.is_null()) || several.iter().any(|p| !p.is_null());
        if has_markers || !given.spans.is_null() {
            bail!(InvalidArgument, "options have spans or markers; a preset is in place of them");
        }
        let preset = Preset::named(name)?;
        (given.start_markers, given.num_start_markers) = preset.start.array();
        (given.end_markers, given.num_end_markers) = preset.end.array();
        (given.turn_markers, given.num_turn_markers) = preset.turn.array();
        given.other_turns = preset.other_turns as i32;
        given.closing = preset.closing as i32;
        given.allow_unclosed = preset.allow_unclosed.into();
        // SAFETY: the caller's struct, which has the size of ours.
        unsafe { write_struct("options", options, &given) }
    })
}

/// A preset as C reads it.
struct Preset {
    start: Strings,
    end: Strings,
    turn: Strings,
    other_turns: OtherTurns,
    closing: Closing,
    allow_unclosed: bool,
}

impl Preset {
    fn named(name: &str) -> Result<&'static Preset> {
        static KEPT: [OnceLock<Preset>; PRESETS.len()] = [const { OnceLock::new() }; PRESETS.len()];
        let markers = Markers::preset(name)?;
        let known = PRESETS.iter().zip(&KEPT).find(|(known, _)| **known == name);
        let Some((_, kept)) = known else { bail!(Internal, "the preset {name} is not listed") };
        Ok(kept.get_or_init(|| Preset {
            start: Strings::new(&markers.start),
            end: Strings::new(&markers.end),
            turn: Strings::new(markers.turn.as_deref().unwrap_or_default()),
            other_turns: markers.other_turns,
            closing: markers.closing,
            allow_unclosed: markers.allow_unclosed,
        }))
    }
}

/// An array of strings that lives as long as the library.
struct Strings(Vec<*const c_char>);

// SAFETY: nothing writes to the strings or frees them.
unsafe impl Send for Strings {}
// SAFETY: as above.
unsafe impl Sync for Strings {}

impl Strings {
    fn new(texts: &[&str]) -> Strings {
        let kept = |text: &&str| CString::new(*text).unwrap_or_default().into_raw().cast_const();
        Strings(texts.iter().map(kept).collect())
    }

    fn array(&self) -> (*const *const c_char, usize) {
        (self.0.as_ptr(), self.0.len())
    }
}

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
    let [start, end, turn, injected] = unsafe {
        let o = options;
        [
            texts(
                "start_marker",
                "start_markers",
                o.start_marker,
                o.start_markers,
                o.num_start_markers,
            )?,
            texts("end_marker", "end_markers", o.end_marker, o.end_markers, o.num_end_markers)?,
            texts(
                "turn_marker",
                "turn_markers",
                o.turn_marker,
                o.turn_markers,
                o.num_turn_markers,
            )?,
            texts(
                "injected",
                "injected_texts",
                o.injected,
                o.injected_texts,
                o.num_injected_texts,
            )?,
        ]
    };
    let Some(closing) = Closing::from_code(options.closing) else {
        bail!(InvalidArgument, "there is no closing {}", options.closing);
    };
    let Some(other_turns) = OtherTurns::from_code(options.other_turns) else {
        bail!(InvalidArgument, "options.other_turns is {}, which is none", options.other_turns);
    };
    let allow_unclosed = flag("options.allow_unclosed", options.allow_unclosed)?;
    if !options.spans.is_null() {
        if start.is_some() || end.is_some() {
            bail!(InvalidArgument, "options have spans and markers; give one of them");
        }
        let is_set = turn.is_some()
            || injected.is_some()
            || closing != Closing::default()
            || other_turns != OtherTurns::default()
            || allow_unclosed;
        if is_set {
            bail!(
                InvalidArgument,
                "options.turn_marker, turn_markers, injected, closing, other_turns and \
                 allow_unclosed belong to markers; spans say it themselves"
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
    let (Some(start), Some(end)) = (start, end) else {
        bail!(
            InvalidArgument,
            "options do not say where the assistant's text is: give spans, or start_marker and \
             end_marker, or start_markers and end_markers"
        );
    };
    let injected = injected.unwrap_or_default();
    Ok(Turns::Markers(Markers { start, end, turn, other_turns, injected, closing, allow_unclosed }))
}

/// One text, or several; None for neither.
///
/// # Safety
/// As blockem_mask_options says of its pointers.
unsafe fn texts<'a>(
    one_name: &str,
    several_name: &str,
    one: *const c_char,
    several: *const *const c_char,
    n: usize,
) -> Result<Option<Texts<'a>>> {
    // SAFETY: the caller's promise.
    let one = unsafe { read_text(&format!("options.{one_name}"), one)? };
    if several.is_null() {
        if n > 0 {
            bail!(NullPointer, "options.{several_name} is NULL");
        }
        return Ok(one.map(|one| Texts::Owned(vec![one])));
    }
    if one.is_some() {
        bail!(InvalidArgument, "options have {one_name} and {several_name}; give one of them");
    }
    let name = format!("options.{several_name}");
    // SAFETY: the caller's promise.
    let pointers = unsafe { array(&name, several, n) }?;
    let text = |(i, pointer): (usize, &*const c_char)| {
        // SAFETY: the caller's promise.
        match unsafe { read_text(&format!("{name}[{i}]"), *pointer)? } {
            Some(text) => Ok(text),
            None => bail!(NullPointer, "{name}[{i}] is NULL"),
        }
    };
    Ok(Some(pointers.iter().enumerate().map(text).collect::<Result<_>>()?))
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
