//! Which tokens of a text the assistant wrote: spans or role markers, and where each token lies in
//! the text, give a mask. Needs no tokenizer; [`crate::tokenizer`] brings one.

mod markers;
mod presets;

use std::ops::Range;

pub use markers::{Closing, Markers, OtherTurns, Texts};
pub use presets::PRESETS;

use crate::error::{Result, bail};

/// Bytes of text, end excluded.
pub type Span = Range<usize>;

/// Longest text: what a tokenizer keeps of each byte is some hundred bytes.
pub const MAX_TEXT: usize = 16 << 20;

/// What a mask marks.
#[derive(Clone, Debug)]
pub struct MaskOptions<'a> {
    pub turns: Turns<'a>,
    pub border: Border,
    /// A mask of zeros is an answer, not an error.
    pub allow_empty: bool,
}

/// Where the assistant's text is.
#[derive(Clone, Debug)]
pub enum Turns<'a> {
    /// Ascending and apart from each other. They may be empty.
    Spans(Vec<Span>),
    Markers(Markers<'a>),
}

/// What becomes of a token that lies partly in a span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Border {
    /// Marked: the model that writes the span writes this token.
    #[default]
    Include = 0,
    Exclude = 1,
    /// An error.
    Refuse = 2,
}

impl Border {
    pub fn from_code(code: i32) -> Option<Border> {
        use Border::*;
        [Include, Exclude, Refuse].into_iter().find(|b| *b as i32 == code)
    }
}

/// One byte for each token, 1 where it is the assistant's.
///
/// offsets: the bytes of the text that each token stands for; an empty range, as of a token that is
/// not in the text, is never marked.
pub fn mask_from_offsets(text: &str, options: &MaskOptions, offsets: &[Span]) -> Result<Vec<u8>> {
    check_length(text)?;
    let spans = match &options.turns {
        Turns::Spans(spans) => checked(text, spans)?,
        Turns::Markers(markers) => markers.spans(text)?,
    };
    let spans = joined(spans);
    for (i, offset) in offsets.iter().enumerate() {
        if offset.start > offset.end || offset.end > text.len() {
            bail!(
                InvalidArgument,
                "token {i} is at bytes {}..{} of a text of {}",
                offset.start,
                offset.end,
                text.len()
            );
        }
    }
    let mask = mark(text, &spans, options.border, offsets)?;
    expect_tokens(options, &spans, &mask)?;
    Ok(mask)
}

pub fn check_length(text: &str) -> Result<()> {
    if text.len() > MAX_TEXT {
        bail!(InvalidArgument, "the text has {} bytes; at most {MAX_TEXT}", text.len());
    }
    Ok(())
}

/// An error for a mask that marks nothing, unless that was asked for.
fn expect_tokens(options: &MaskOptions, spans: &[Span], mask: &[u8]) -> Result<()> {
    if options.allow_empty || mask.contains(&1) {
        return Ok(());
    }
    let reason = match (&options.turns, spans) {
        (Turns::Markers(markers), []) => format!(
            "no turn that begins with {} has any text; look at what the chat template writes",
            markers::listed(&markers.start)
        ),
        (Turns::Spans(_), []) => {
            "no span has any text; many chat templates mark no assistant text \
                                  at all, so give role markers, or spans that were found otherwise"
                .into()
        }
        (_, [first, ..]) => format!(
            "the assistant's text begins at byte {}, and none of the {} tokens stands for any of \
             it (was it cut off?)",
            first.start,
            mask.len()
        ),
    };
    bail!(MaskEmpty, "the mask would be empty: {reason}")
}

fn mark(text: &str, spans: &[Span], border: Border, offsets: &[Span]) -> Result<Vec<u8>> {
    let marks = offsets.iter().enumerate().map(|(i, offset)| {
        // The first span that ends behind the token's beginning is the only one to look at: spans
        // that touch are one.
        let span = spans.get(spans.partition_point(|span| span.end <= offset.start));
        let Some(span) = span.filter(|span| !offset.is_empty() && span.start < offset.end) else {
            return Ok(0);
        };
        if span.start <= offset.start && offset.end <= span.end {
            return Ok(1);
        }
        match border {
            Border::Include => Ok(1),
            Border::Exclude => Ok(0),
            Border::Refuse => bail!(
                MaskUnaligned,
                "token {i} ({:?}, bytes {}..{}) lies partly in the assistant's text, {}..{}",
                text.get(offset.clone()).unwrap_or("part of a character"),
                offset.start,
                offset.end,
                span.start,
                span.end
            ),
        }
    });
    marks.collect()
}

fn checked(text: &str, spans: &[Span]) -> Result<Vec<Span>> {
    let mut last = 0;
    for (i, span) in spans.iter().enumerate() {
        let (start, end) = (span.start, span.end);
        if start > end || end > text.len() {
            bail!(InvalidArgument, "span {i} is {start}..{end} in a text of {} bytes", text.len());
        }
        if start < last {
            bail!(
                InvalidArgument,
                "span {i} begins at byte {start}, before the end of another at {last}: spans must \
                 ascend and not overlap"
            );
        }
        if let Some(at) = [start, end].into_iter().find(|at| !text.is_char_boundary(*at)) {
            bail!(
                InvalidArgument,
                "span {i} is {start}..{end}, and byte {at} is in the middle of a character: spans \
                 count bytes of UTF-8"
            );
        }
        last = end;
    }
    Ok(spans.to_vec())
}

/// Without empty spans; those that touch are one.
fn joined(spans: Vec<Span>) -> Vec<Span> {
    let mut out: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans.into_iter().filter(|span| !span.is_empty()) {
        match out.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            _ => out.push(span),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::random::Random;

    fn options(turns: Turns<'_>) -> MaskOptions<'_> {
        MaskOptions { turns, border: Border::Include, allow_empty: false }
    }

    #[test]
    fn spans_that_make_no_sense_are_refused() {
        let status = |turns| {
            mask_from_offsets("caf\u{e9} <|im_end|>", &options(turns), &[]).unwrap_err().status
        };
        use crate::error::Status::{InvalidArgument, MaskEmpty};
        let spans = |spans: &[(usize, usize)]| {
            Turns::Spans(spans.iter().map(|&(start, end)| start..end).collect())
        };
        // Backwards, beyond the text, overlapping, descending, within the é.
        for wrong in [&[(3, 2)][..], &[(0, 17)], &[(0, 3), (2, 5)], &[(5, 6), (0, 1)], &[(0, 4)]] {
            assert_eq!(status(spans(wrong)), InvalidArgument, "{wrong:?}");
        }
        for empty in [&[][..], &[(0, 0)], &[(3, 3), (3, 3)]] {
            assert_eq!(status(spans(empty)), MaskEmpty, "{empty:?}");
        }
        let long = "a".repeat(MAX_TEXT + 1);
        let error = mask_from_offsets(&long, &options(spans(&[(0, 1)])), &[]).unwrap_err();
        assert_eq!(error.status, InvalidArgument);
    }

    #[test]
    fn offsets_beyond_the_text_are_refused() {
        let options = options(Turns::Spans(vec![Span { start: 0, end: 3 }]));
        for wrong in [Span { start: 2, end: 4 }, Span { start: 2, end: 1 }] {
            let error = mask_from_offsets("why", &options, &[0..1, wrong]).unwrap_err();
            assert!(error.message.contains("token 1"), "{error}");
        }
    }

    /// Against the definition: a token is marked where any, or every, byte of it is in a span.
    #[test]
    fn marks_are_those_of_the_bytes() {
        let mut random = Random::fresh();
        println!("{random:?}");
        for _ in 0..2000 {
            let n = 1 + random.below(40);
            let text = "x".repeat(n);
            let mut cuts: Vec<usize> =
                (0..2 * random.below(5)).map(|_| random.below(n + 1)).collect();
            cuts.sort();
            let spans: Vec<Span> = cuts.chunks(2).map(|pair| pair[0]..pair[1]).collect();
            let offsets: Vec<Span> = (0..random.below(30))
                .map(|_| {
                    let start = random.below(n + 1);
                    start..start + random.below(n + 1 - start)
                })
                .collect();
            let written = |byte: usize| spans.iter().any(|span| span.contains(&byte));
            for border in [Border::Include, Border::Exclude, Border::Refuse] {
                let turns = Turns::Spans(spans.clone());
                let options = MaskOptions { turns, border, allow_empty: true };
                let mask = mask_from_offsets(&text, &options, &offsets);
                let partly =
                    |token: &Span| token.clone().any(written) && !token.clone().all(written);
                if border == Border::Refuse && offsets.iter().any(partly) {
                    assert_eq!(mask.unwrap_err().status, crate::error::Status::MaskUnaligned);
                    continue;
                }
                let marked = |token: &Span| match border {
                    Border::Include => token.clone().any(written),
                    _ => !token.is_empty() && token.clone().all(written),
                };
                let expected: Vec<u8> = offsets.iter().map(|token| marked(token).into()).collect();
                assert_eq!(mask.unwrap(), expected, "{spans:?} {offsets:?} {border:?}");
            }
        }
    }
}
