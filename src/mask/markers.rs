//! Finds the assistant's turns between the markers of a chat template.

use std::borrow::Cow;
use std::cmp::Reverse;

use super::Span;
use crate::error::{Error, Result, Status, bail};

/// One or several markers.
pub type Texts<'a> = Cow<'a, [&'a str]>;

/// How a chat template marks the assistant's turns. Where several markers stand at one place, the
/// longest counts.
#[derive(Clone, Debug)]
pub struct Markers<'a> {
    /// What comes before the assistant's text, such as `<|im_start|>assistant\n`. Never marked.
    pub start: Texts<'a>,
    /// What comes after it, such as `<|im_end|>`: the first that comes closes the turn. It may be
    /// what begins the next turn, as in GLM.
    pub end: Texts<'a>,
    /// What the turns of other roles, or of every role, begin with, such as `<|im_start|>`: a turn
    /// that opens within the assistant's is an error. None derives them from `start`
    /// ([`Markers::turn_markers`]); an empty list looks at the assistant's turns alone.
    pub turn: Option<Texts<'a>>,
    pub other_turns: OtherTurns,
    /// What the template itself puts before some answers, such as an empty thinking block: the
    /// longest of these that a turn begins with is no part of the assistant's text.
    pub injected: Texts<'a>,
    pub closing: Closing,
    /// The last turn may lack its end marker: it then ends with the text.
    pub allow_unclosed: bool,
}

/// How the turns of other roles end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum OtherTurns {
    /// Closed, where their marker is what the assistant's turns begin with, too; else open.
    #[default]
    Auto = 0,
    /// By an end marker, as the assistant's: a turn that opens within them is an error, because a
    /// message then holds a marker.
    Closed = 1,
    /// Where the next turn begins, as in DeepSeek, GLM and Mistral: an end marker within them is an
    /// error.
    Open = 2,
}

/// Whether the end marker belongs to the assistant's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Closing {
    #[default]
    Include = 0,
    Exclude = 1,
}

impl OtherTurns {
    pub fn from_code(code: i32) -> Option<OtherTurns> {
        use OtherTurns::*;
        [Auto, Closed, Open].into_iter().find(|o| *o as i32 == code)
    }
}

impl Closing {
    pub fn from_code(code: i32) -> Option<Closing> {
        use Closing::*;
        [Include, Exclude].into_iter().find(|c| *c as i32 == code)
    }
}

impl<'a> Markers<'a> {
    /// What opens turns beside the start markers: `turn`, or what the start markers tell of it. The
    /// bracketed word before a role's name opens every role's turn (`<|im_start|>` of
    /// `<|im_start|>assistant`); where the role is the bracketed word itself (`<|assistant|>`), the
    /// other roles' words do (`<|user|>`, `<|tool|>`, ...).
    pub fn turn_markers(&self) -> Vec<Cow<'a, str>> {
        match &self.turn {
            Some(turn) => turn.iter().map(|marker| Cow::Borrowed(*marker)).collect(),
            None => self.start.iter().flat_map(|start| derived(start)).collect(),
        }
    }

    /// The assistant's text in ascending spans, which may be empty.
    pub(super) fn spans(&self, text: &str) -> Result<Vec<Span>> {
        self.check()?;
        let turn = self.turn_markers();
        let mut scan = Scan::new(text, self, &turn);
        let (mut found, mut from) = (Vec::new(), 0);
        while let Some(opening) = scan.opening(from) {
            let (at, body) = (opening.at, opening.after());
            let (close, next) = (scan.ends.first(body), scan.opening(body));
            // A marker that ends this turn may begin the next one.
            let close = close.filter(|close| next.is_none_or(|next| close.at <= next.at));
            let next_at = next.map_or(text.len(), |next| next.at);
            // Between a start marker and the next turn: nothing was written there.
            let is_blank =
                opening.is_assistant && next.is_some() && text[body..next_at].trim().is_empty();
            let is_open = !opening.is_assistant && self.other_turns == OtherTurns::Open;
            match close {
                None if is_blank || !opening.closes => {
                    from = next_at;
                    continue;
                }
                None if next.is_some() => return Err(self.unclosed_before(&opening, next_at)),
                None if !self.allow_unclosed => bail!(
                    MaskUnaligned,
                    "the turn at byte {at} is not closed by {}: the text was cut or the end marker \
                     is another; allow_unclosed takes it up to the end of the text",
                    listed(&self.end)
                ),
                Some(close) if is_open && close.at < next_at => bail!(
                    MaskUnaligned,
                    "the turn of another role at byte {at} holds the end marker {:?} at byte {}, \
                     which only the assistant writes: a message holds it, or the template left out \
                     what begins the assistant's turn; give spans",
                    close.marker,
                    close.at
                ),
                _ => {}
            }
            let stop = close.map_or(text.len(), |close| close.at);
            let after = close.map_or(text.len(), |close| close.after());
            if opening.is_assistant {
                let injected = self.injected.iter().filter(|i| text[body..stop].starts_with(**i));
                let start = body + injected.map(|i| i.len()).max().unwrap_or(0);
                found.push(start..if self.closing == Closing::Include { after } else { stop });
            }
            from = after.min(next_at);
        }
        Ok(found)
    }

    fn unclosed_before(&self, turn: &Opening, inner: usize) -> Error {
        let remedy = if turn.is_assistant {
            "a message holds a marker, or the template has another end marker: name every end \
             marker, or give spans"
        } else {
            "a message holds a marker, or other roles' turns have no end marker: give spans, or set \
             other_turns to open"
        };
        let derived = match self.turn {
            Some(_) => "",
            None => {
                " (the turn markers were derived from the start marker; an empty list of them looks \
                 at the assistant's turns alone)"
            }
        };
        Error::new(
            Status::MaskUnaligned,
            format!(
                "the turn at byte {} is not closed by {} before another opens at byte {inner}: \
                 {remedy}{derived}",
                turn.at,
                listed(&self.end)
            ),
        )
    }

    fn check(&self) -> Result<()> {
        let turn = self.turn.as_deref().unwrap_or_default();
        for (name, texts) in [("start", &*self.start), ("end", &*self.end), ("turn", turn)] {
            if texts.contains(&"") {
                bail!(InvalidArgument, "the {name} marker is empty");
            }
        }
        for (name, texts) in [("start", &self.start), ("end", &self.end)] {
            if texts.is_empty() {
                bail!(InvalidArgument, "there is no {name} marker");
            }
        }
        if self.injected.contains(&"") {
            bail!(InvalidArgument, "the injected text is empty");
        }
        for turn in turn {
            let inner = self.start.iter().find(|s| s.contains(turn) && !s.starts_with(turn));
            if let Some(start) = inner {
                bail!(
                    InvalidArgument,
                    "the start marker {start:?} holds the turn marker {turn:?} and does not begin \
                     with it"
                );
            }
        }
        Ok(())
    }
}

/// The roles that write beside the assistant.
const OTHER_ROLES: [&str; 10] = [
    "user",
    "human",
    "system",
    "developer",
    "tool",
    "tool_response",
    "observation",
    "function",
    "ipython",
    "environment",
];

/// See [`Markers::turn_markers`].
fn derived<'a>(start: &'a str) -> Vec<Cow<'a, str>> {
    let start = start.trim_end();
    let Some(end) = start.find('>').filter(|_| start.starts_with('<')).map(|end| end + 1) else {
        return Vec::new();
    };
    let (word, rest) = start.split_at(end);
    if rest.starts_with(char::is_alphanumeric) {
        return vec![Cow::Borrowed(word)];
    }
    let spelled = |role: &str| -> [(&'static str, String); 3] {
        let title = format!("{}{}", role[..1].to_uppercase(), &role[1..]);
        [("assistant", role.into()), ("Assistant", title), ("ASSISTANT", role.to_uppercase())]
    };
    let others = OTHER_ROLES.iter().flat_map(|role| spelled(role));
    let others = others.filter(|(own, _)| word.contains(own));
    others.map(|(own, other)| Cow::Owned(word.replace(own, &other))).collect()
}

/// Markers as they stand in messages.
pub(super) fn listed(markers: &[&str]) -> String {
    let quoted: Vec<String> = markers.iter().map(|marker| format!("{marker:?}")).collect();
    quoted.join(" or ")
}

/// Where a turn opens.
#[derive(Clone, Copy)]
struct Opening {
    at: usize,
    len: usize,
    is_assistant: bool,
    /// By an end marker.
    closes: bool,
}

impl Opening {
    fn after(&self) -> usize {
        self.at + self.len
    }
}

/// The markers in a text, from its beginning to its end.
struct Scan<'t> {
    starts: Finder<'t>,
    turns: Finder<'t>,
    ends: Finder<'t>,
    start_markers: &'t [&'t str],
    other_turns: OtherTurns,
}

impl<'t> Scan<'t> {
    fn new(text: &'t str, markers: &'t Markers, turn: &'t [Cow<str>]) -> Scan<'t> {
        Scan {
            starts: Finder::new(text, markers.start.iter().copied()),
            turns: Finder::new(text, turn.iter().map(|marker| &**marker)),
            ends: Finder::new(text, markers.end.iter().copied()),
            start_markers: &markers.start,
            other_turns: markers.other_turns,
        }
    }

    fn opening(&mut self, from: usize) -> Option<Opening> {
        let start = self.starts.first(from);
        let turn = self.turns.first(from).filter(|turn| {
            start.is_none_or(|start| {
                turn.at < start.at || turn.at == start.at && turn.marker.len() > start.marker.len()
            })
        });
        if let Some(turn) = turn {
            let closes = match self.other_turns {
                OtherTurns::Closed => true,
                OtherTurns::Open => false,
                OtherTurns::Auto => {
                    self.start_markers.iter().any(|start| start.starts_with(turn.marker))
                }
            };
            return Some(Opening {
                at: turn.at,
                len: turn.marker.len(),
                is_assistant: false,
                closes,
            });
        }
        let own = |Hit { at, marker }| Opening {
            at,
            len: marker.len(),
            is_assistant: true,
            closes: true,
        };
        start.map(own)
    }
}

#[derive(Clone, Copy)]
struct Hit<'t> {
    at: usize,
    marker: &'t str,
}

impl Hit<'_> {
    fn after(&self) -> usize {
        self.at + self.marker.len()
    }
}

/// Finds markers in a text at places that ascend; each byte is looked at once for each marker, also
/// where a marker never comes.
struct Finder<'t> {
    text: &'t str,
    /// Each with its first place at or behind the byte that was last asked for.
    markers: Vec<(&'t str, usize)>,
    #[cfg(test)]
    bytes_searched: usize,
}

impl<'t> Finder<'t> {
    fn new(text: &'t str, markers: impl Iterator<Item = &'t str>) -> Finder<'t> {
        let mut finder = Finder {
            text,
            markers: Vec::new(),
            #[cfg(test)]
            bytes_searched: 0,
        };
        for marker in markers {
            let at = finder.search(marker, 0);
            finder.markers.push((marker, at));
        }
        finder
    }

    /// The first marker at or behind `from`, which must not descend from call to call.
    fn first(&mut self, from: usize) -> Option<Hit<'t>> {
        for i in 0..self.markers.len() {
            let (marker, at) = self.markers[i];
            if at < from {
                self.markers[i].1 = self.search(marker, from);
            }
        }
        let there = self.markers.iter().filter(|(_, at)| *at != NOWHERE);
        let (marker, at) = *there.min_by_key(|(marker, at)| (*at, Reverse(marker.len())))?;
        Some(Hit { at, marker })
    }

    fn search(&mut self, marker: &str, from: usize) -> usize {
        let at = self.text[from..].find(marker).map_or(NOWHERE, |at| from + at);
        #[cfg(test)]
        {
            self.bytes_searched += (at.saturating_add(marker.len())).min(self.text.len()) - from;
        }
        at
    }
}

/// Behind the end of every text.
const NOWHERE: usize = usize::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::random::Random;

    const CHATML: Markers = Markers {
        start: Cow::Borrowed(&["<|im_start|>assistant\n"]),
        end: Cow::Borrowed(&["<|im_end|>"]),
        turn: None,
        other_turns: OtherTurns::Auto,
        injected: Cow::Borrowed(&[]),
        closing: Closing::Include,
        allow_unclosed: false,
    };
    /// Looks at the assistant's turns alone.
    const ALONE: Markers = Markers { turn: Some(Cow::Borrowed(&[])), ..CHATML };

    /// What the markers find, as text.
    fn texts<'t>(text: &'t str, markers: &Markers) -> Result<Vec<&'t str>> {
        let spans = markers.spans(text)?.into_iter();
        Ok(spans.filter(|span| !span.is_empty()).map(|span| &text[span]).collect())
    }

    fn refused(text: &str, markers: &Markers, words: &[&str]) {
        let error = texts(text, markers).unwrap_err();
        assert_eq!(error.status, Status::MaskUnaligned, "{error}");
        assert!(words.iter().all(|word| error.message.contains(word)), "{error}");
    }

    #[test]
    fn markers_find_every_turn_with_its_closing() {
        let text = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nfor é<|im_end|>\n\
                    <|im_start|>assistant\n<|im_end|>";
        assert_eq!(texts(text, &CHATML).unwrap(), ["for é<|im_end|>", "<|im_end|>"]);
        let exclude = Markers { closing: Closing::Exclude, ..CHATML };
        assert_eq!(texts(text, &exclude).unwrap(), ["for é"]);
        let strict = Markers { turn: Some(Cow::Borrowed(&["<|im_start|>"])), ..exclude };
        assert_eq!(texts(text, &strict).unwrap(), ["for é"]);
        assert_eq!(texts("nothing here", &CHATML).unwrap(), [""; 0]);
        assert_eq!(texts("", &CHATML).unwrap(), [""; 0]);
    }

    #[test]
    fn an_unclosed_turn_is_refused_unless_it_may_be_the_last() {
        let text = "<|im_start|>assistant\nfor <|im_end|>\n<|im_start|>assistant\nit was c";
        refused(text, &CHATML, &["byte 37", "allow_unclosed"]);
        let open = Markers { allow_unclosed: true, ..CHATML };
        assert_eq!(texts(text, &open).unwrap(), ["for <|im_end|>", "it was c"]);
        // Only the last: a turn that another follows was closed by something else.
        let text = "<|im_start|>assistant\nfor</s>\n<|im_start|>assistant\nit";
        refused(text, &open, &["byte 0", "byte 30"]);
        // Nothing has been written after a generation prompt.
        assert_eq!(texts("<|im_start|>assistant\n", &open).unwrap(), [""; 0]);
    }

    #[test]
    fn a_marker_in_a_users_message_is_refused() {
        let inner = "<|im_start|>user\nsay <|im_start|>assistant\nyes<|im_end|>\n\
                     <|im_start|>assistant\nno<|im_end|>";
        // The assistant's markers alone cannot tell who wrote them; every role's can.
        assert_eq!(texts(inner, &ALONE).unwrap(), ["yes<|im_end|>", "no<|im_end|>"]);
        let given = Markers { turn: Some(Cow::Borrowed(&["<|im_start|>"])), ..CHATML };
        refused(inner, &given, &["byte 0", "byte 21", "holds a marker"]);
        refused(inner, &CHATML, &["byte 0", "byte 21", "holds a marker", "were derived"]);
        // An end marker before it makes it a turn like any other: only spans know better.
        let forged = inner.replacen("say ", "say <|im_end|>", 1);
        assert_eq!(texts(&forged, &CHATML).unwrap(), ["yes<|im_end|>", "no<|im_end|>"]);
    }

    #[test]
    fn what_the_template_injects_is_not_the_assistants() {
        let injected = Cow::Borrowed(&["<think>", "<think>\n\n</think>\n\n"][..]);
        let think = Markers { injected, ..CHATML };
        let text = "<|im_start|>assistant\n<think>\n\n</think>\n\nyes<|im_end|>";
        assert_eq!(texts(text, &think).unwrap(), ["yes<|im_end|>"]);
        let thought = text.replace("\n\n</think>", "\nhm\n</think>");
        assert_eq!(
            texts(&thought, &think).unwrap(),
            ["\nhm\n</think>\n\nyes<|im_end|>"],
            "thoughts of its own are, behind what the prompt begins them with"
        );
        assert_eq!(texts(text, &CHATML).unwrap(), [&text[22..]]);
    }

    #[test]
    fn the_first_of_several_ends_closes_a_turn() {
        let text = "<|start|>user<|message|>U<|end|><|start|>assistant<|channel|>analysis<|message|>\
                    T<|end|><|start|>assistant to=f<|message|>{}<|call|><|start|>f to=assistant\
                    <|message|>R<|end|><|start|>assistant<|message|>A<|return|>";
        let harmony = Markers::preset("harmony").unwrap();
        let expected = [
            "<|channel|>analysis<|message|>T<|end|>",
            " to=f<|message|>{}<|call|>",
            "<|message|>A<|return|>",
        ];
        assert_eq!(texts(text, &harmony).unwrap(), expected);
        let exclude = Markers { closing: Closing::Exclude, ..harmony.clone() };
        assert_eq!(texts(text, &exclude).unwrap()[1..], [" to=f<|message|>{}", "<|message|>A"]);
        // A tool's reply is not the assistant's where its end marker is not known, with or without
        // turn markers, unclosed or not.
        for turn in [harmony.turn.clone(), None] {
            for allow_unclosed in [false, true] {
                let end = Cow::Borrowed(&["<|end|>"][..]);
                let few = Markers { end, turn: turn.clone(), allow_unclosed, ..harmony.clone() };
                refused(text, &few, &["name every end marker"]);
            }
        }
        // The end of the one may begin like another: the longer one counts.
        let nested = Markers { end: Cow::Borrowed(&["<|im_end|>", "<|im_end|>\n"]), ..CHATML };
        let text = "<|im_start|>assistant\nyes<|im_end|>\n";
        assert_eq!(texts(text, &nested).unwrap(), ["yes<|im_end|>\n"]);
    }

    #[test]
    fn a_turn_may_end_where_the_next_one_begins() {
        let glm = Markers::preset("glm4").unwrap();
        let text = "<|system|>\nS<|user|>\nU<|assistant|>\nC<|observation|>\nR<|assistant|>\nA";
        assert_eq!(texts(text, &glm).unwrap(), ["\nC<|observation|>", "\nA"]);
        let exclude = Markers { closing: Closing::Exclude, ..glm };
        assert_eq!(texts(text, &exclude).unwrap(), ["\nC", "\nA"]);
    }

    #[test]
    fn roles_may_have_markers_of_their_own() {
        let deepseek = Markers::preset("deepseek").unwrap();
        let eos = "<｜end▁of▁sentence｜>";
        let text =
            format!("<｜User｜>why<｜Assistant｜>for{eos}<｜User｜>so<｜Assistant｜>it{eos}");
        assert_eq!(texts(&text, &deepseek).unwrap(), [format!("for{eos}"), format!("it{eos}")]);
        // A marker in a message leaves the assistant's turn unclosed.
        refused(&text.replace("why", "say <｜Assistant｜>yes"), &deepseek, &["holds a marker"]);
        refused(&text.replace("for", "say <｜User｜>why"), &deepseek, &["holds a marker"]);
        // What only the assistant writes is not another role's.
        let words = ["byte 0 holds the end marker", "byte 15"];
        refused(&text.replace("why", &format!("say{eos}")), &deepseek, &words);
        // Several replies: between two of them there is no turn.
        let replies = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>R<｜tool▁output▁end｜>\n\
                       <｜tool▁output▁begin｜>S<｜tool▁output▁end｜><｜tool▁outputs▁end｜>";
        let text = format!("<｜User｜>U<｜Assistant｜>C{eos}{replies}A{eos}");
        assert_eq!(texts(&text, &deepseek).unwrap(), [format!("C{eos}"), format!("A{eos}")]);

        let phi = Markers::preset("phi3").unwrap();
        let text = "<|user|>\nwhy<|end|>\n<|assistant|>\nfor<|end|>\n";
        assert_eq!(texts(text, &phi).unwrap(), ["for<|end|>"]);
        // Other roles' turns are closed there, and this one is not.
        let forged = text.replace("why", "say <|assistant|>\nyes");
        refused(&forged, &phi, &["byte 0 is not closed", "holds a marker"]);
    }

    #[test]
    fn what_opens_other_roles_turns_is_derived_from_the_start() {
        let of = |start: &'static str| {
            let start = Cow::Owned(vec![start]);
            Markers { start, ..CHATML }.turn_markers().join(" ")
        };
        assert_eq!(of("<|im_start|>assistant\n"), "<|im_start|>");
        assert_eq!(of("<|start_header_id|>assistant<|end_header_id|>\n\n"), "<|start_header_id|>");
        assert_eq!(of("<start_of_turn>model\n"), "<start_of_turn>");
        assert!(of("<|assistant|>\n").starts_with("<|user|> <|human|> <|system|> "));
        assert!(of("<｜Assistant｜>").contains("<｜User｜> "));
        for nothing in ["### Response:\n", "[/INST]", "<|im_start|>", "<", ">", "\n"] {
            assert_eq!(of(nothing), "", "{nothing:?}");
        }
    }

    #[test]
    fn every_preset_has_sound_markers() {
        for name in crate::mask::PRESETS {
            let markers = Markers::preset(name).unwrap();
            let (start, end) = (markers.start[0], markers.end[0]);
            let text = format!("{start}yes{end}");
            assert_eq!(texts(&text, &markers).unwrap(), [format!("yes{end}")], "{name}");
        }
        let error = Markers::preset("ChatML").unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument);
        assert!(error.message.contains("chatml, qwen, harmony"), "{error}");
    }

    #[test]
    fn markers_that_make_no_sense_are_refused() {
        let one = |text: &'static str| -> Texts<'static> { Cow::Owned(vec![text]) };
        let none = || -> Texts<'static> { Cow::Borrowed(&[]) };
        for (wrong, word) in [
            (Markers { start: one(""), ..CHATML }, "start marker is empty"),
            (Markers { end: Cow::Borrowed(&["<|im_end|>", ""]), ..CHATML }, "end marker is empty"),
            (Markers { turn: Some(one("")), ..CHATML }, "turn marker is empty"),
            (Markers { injected: one(""), ..CHATML }, "injected text is empty"),
            (Markers { start: none(), ..CHATML }, "no start marker"),
            (Markers { end: none(), ..CHATML }, "no end marker"),
            (Markers { turn: Some(one("assistant")), ..CHATML }, "does not begin with it"),
        ] {
            let error = texts("", &wrong).unwrap_err();
            assert_eq!(error.status, Status::InvalidArgument);
            assert!(error.message.contains(word), "{error}");
        }
    }

    /// The turns by one look at every byte, `Err` where they are refused.
    fn byte_by_byte(text: &str, markers: &Markers) -> std::result::Result<Vec<Span>, ()> {
        let turn = markers.turn_markers();
        let longest = |at: usize, of: &mut dyn Iterator<Item = &str>| {
            of.filter(|marker| text[at..].starts_with(*marker)).map(str::len).max()
        };
        let start_at = |at| longest(at, &mut markers.start.iter().copied());
        let turn_at = |at| longest(at, &mut turn.iter().map(|marker| &**marker));
        // Its length, and whether it is the assistant's.
        let opening = |at: usize| match (start_at(at), turn_at(at)) {
            (Some(start), turn) if turn.is_none_or(|turn| turn <= start) => Some((start, true)),
            (_, turn) => turn.map(|turn| (turn, false)),
        };
        let (mut spans, mut at) = (Vec::new(), 0);
        let mut turn: Option<(usize, bool, bool)> = None;
        while at < text.len() {
            if !text.is_char_boundary(at) {
                at += 1;
                continue;
            }
            if let Some((body, is_assistant, closes)) = turn {
                if let Some(len) = longest(at, &mut markers.end.iter().copied()) {
                    if !is_assistant
                        && markers.other_turns == OtherTurns::Open
                        && opening(at).is_none()
                    {
                        return Err(());
                    }
                    if is_assistant {
                        let include = markers.closing == Closing::Include;
                        spans.push(body..if include { at + len } else { at });
                    }
                    turn = None;
                    let next =
                        (at..at + len).find(|i| text.is_char_boundary(*i) && opening(*i).is_some());
                    at = next.unwrap_or(at + len);
                } else if opening(at).is_none() {
                    at += 1;
                } else if !closes || is_assistant && text[body..at].trim().is_empty() {
                    turn = None;
                } else {
                    return Err(());
                }
            } else if let Some((len, is_assistant)) = opening(at) {
                let marker = &text[at..at + len];
                let closes = is_assistant
                    || match markers.other_turns {
                        OtherTurns::Auto => markers.start.iter().any(|s| s.starts_with(marker)),
                        other => other == OtherTurns::Closed,
                    };
                at += len;
                turn = Some((at, is_assistant, closes));
            } else {
                at += 1;
            }
        }
        match turn {
            Some((_, _, true)) if !markers.allow_unclosed => return Err(()),
            Some((body, true, _)) => spans.push(body..text.len()),
            _ => {}
        }
        Ok(spans)
    }

    /// Texts of markers, parts of markers and words, by the presets and by markers that begin like
    /// each other.
    #[test]
    fn turns_are_those_of_a_look_at_every_byte() {
        let mut random = Random::fresh();
        println!("{random:?}");
        let odd = Markers {
            start: Cow::Borrowed(&["<a", "<a>é"]),
            end: Cow::Borrowed(&["</", "</a><"]),
            turn: Some(Cow::Borrowed(&["<", "<a>"])),
            ..CHATML
        };
        let presets = crate::mask::PRESETS.map(|name| Markers::preset(name).unwrap());
        let all: Vec<Markers> = presets.into_iter().chain([odd, CHATML, ALONE]).collect();
        let (mut found, mut refusals) = (0, 0);
        for round in 0..6000 {
            let mut markers = all[round % all.len()].clone();
            markers.allow_unclosed ^= random.below(2) == 0;
            markers.other_turns = OtherTurns::from_code(random.below(3) as i32).unwrap();
            markers.closing = Closing::from_code(random.below(2) as i32).unwrap();
            let turn = markers.turn_markers();
            let mut words: Vec<&str> = markers.start.iter().chain(&*markers.end).copied().collect();
            words.extend(turn.iter().map(|marker| &**marker));
            words.extend(["é", "yes", "\n"]);
            let pieces = (0..random.below(12)).map(|_| {
                let word = words[random.below(words.len())];
                let cut = random.below(4 * word.len()).min(word.len());
                if random.below(8) == 0 && word.is_char_boundary(cut) { &word[..cut] } else { word }
            });
            let text: String = pieces.collect();
            let spans = markers.spans(&text);
            found += spans.as_ref().map_or(0, Vec::len);
            refusals += usize::from(spans.is_err());
            assert_eq!(spans.map_err(drop), byte_by_byte(&text, &markers), "{text:?} {markers:?}");
        }
        assert!(found > 1000 && refusals > 1000, "{found} turns and {refusals} refusals");
    }

    /// Also with a marker that never comes.
    #[test]
    fn every_byte_is_searched_once_for_each_marker() {
        let text = "<|start|>assistant<|message|>yes<|end|>".repeat(1000);
        let markers = Markers::preset("harmony").unwrap();
        let mut ends = Finder::new(&text, markers.end.iter().copied());
        let (mut from, mut turns) = (0, 0);
        while let Some(hit) = ends.first(from) {
            (from, turns) = (hit.after(), turns + 1);
        }
        assert_eq!(turns, 1000);
        assert!(ends.bytes_searched <= markers.end.len() * text.len(), "{}", ends.bytes_searched);
    }
}
