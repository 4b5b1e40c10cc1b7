//! JSON as people's tools write it: a byte-order mark is skipped, and Python's NaN, which JSON lacks,
//! is told by its key.

use serde::de::DeserializeOwned;
use serde_json::Value;

const MARK: &[u8] = b"\xef\xbb\xbf";

/// The value of a text; the error is a sentence without its subject.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let text = without_mark(text);
    serde_json::from_slice(text).map_err(|error| {
        if error.is_data() {
            return error.to_string();
        }
        if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
            return "not valid JSON: it is UTF-16 text; save it as UTF-8".to_string();
        }
        match no_number(text) {
            Some((name, None)) => {
                format!("not valid JSON: it holds {name}, and JSON has no such number; remove it")
            }
            Some((name, Some(key))) => {
                format!(
                    "not valid JSON: the key {key} holds {name}, and JSON has no such number; \
                     correct or remove it"
                )
            }
            None => format!("not valid JSON: {error}"),
        }
    })
}

/// A whole number, also one that was saved as a float.
pub fn whole_number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| whole(value.as_f64()?))
}

/// A float that is a whole number; beyond 2^53 none is known to be the one that was meant.
pub fn whole(value: f64) -> Option<i64> {
    let exact = value.fract() == 0.0 && value.abs() <= 2f64.powi(53);
    exact.then_some(value as i64)
}

/// The text behind a byte-order mark, which Windows' editors write.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(MARK).unwrap_or(text)
}

/// The first NaN or infinity outside of strings, and the key before it.
fn no_number(text: &[u8]) -> Option<(&'static str, Option<String>)> {
    const NAMES: [&str; 3] = ["NaN", "-Infinity", "Infinity"];
    let mut key = None;
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        if let Some(name) = NAMES.into_iter().find(|name| rest.starts_with(name.as_bytes())) {
            return Some((name, key));
        }
        at += 1;
        if rest[0] != b'"' {
            continue;
        }
        let start = at;
        while at < text.len() && text[at] != b'"' {
            at += if text[at] == b'\\' { 2 } else { 1 };
        }
        let string = &text[start..at.min(text.len())];
        at += 1;
        let after = text.get(at..).unwrap_or_default();
        if after.trim_ascii_start().starts_with(b":") {
            key = Some(String::from_utf8_lossy(string).chars().take(80).collect());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{parse, whole_number};

    #[test]
    fn whole_numbers_may_be_floats() {
        for (value, expected) in [
            (json!(5), Some(5)),
            (json!(5.0), Some(5)),
            (json!(-3.0), Some(-3)),
            (json!(2.5), None),
            (json!(1e300), None),
            (json!(u64::MAX), None),
            (json!("5"), None),
        ] {
            assert_eq!(whole_number(&value), expected, "{value}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        assert_eq!(parse::<Value>(b"\xef\xbb\xbf{\"a\": 1}"), Ok(json!({"a": 1})));
    }

    #[test]
    fn what_is_no_number_is_told_by_its_key() {
        for (text, words) in [
            (r#"{"a": 1, "b": NaN}"#, ["b ", "NaN"]),
            (r#"{"a: NaN": {"\"c\\": [1, -Infinity]}}"#, [r#"\"c\\ "#, "-Infinity"]),
            (r#"[Infinity]"#, ["it holds", "Infinity"]),
            (r#"{"b": nan}"#, ["line 1", "column"]),
            ("\u{feff}{\"a\": NaN", ["a ", "NaN"]),
            (r#"{"NaN": }"#, ["line 1", "column 9"]),
        ] {
            let error = parse::<Value>(text.as_bytes()).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        }
        assert!(parse::<Value>(b"\xff\xfe{\0}\0").unwrap_err().contains("UTF-8"));
    }
}
