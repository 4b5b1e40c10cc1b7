//! A checkpoint's configuration: keys looked up with errors that name the file and the key.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, Status, bail};
use crate::json;

use super::file::read_small;

/// The largest configuration; parsed, it takes up to 90 times its bytes.
const LIMIT: usize = 128 << 10;

/// Keys from a file, under the ones that the caller gave.
pub(super) struct Config {
    /// Where the keys come from, for messages.
    origin: String,
    given: Map<String, Value>,
    file: Map<String, Value>,
}

impl Config {
    pub fn new(
        origin: String,
        file: Map<String, Value>,
        given: Option<&Map<String, Value>>,
    ) -> Config {
        Config { origin, given: given.cloned().unwrap_or_default(), file }
    }

    /// The keys of a file.
    pub fn read(path: &Path, given: Option<&Map<String, Value>>) -> Result<Config> {
        let origin = path.display().to_string();
        let file = parse_object(&origin, &read_small(path, LIMIT)?)?;
        Ok(Config::new(origin, file, given))
    }

    /// Strings of a safetensors `__metadata__`: one key `cfg` with a JSON object, or flat keys.
    pub fn from_metadata(
        path: &Path,
        metadata: Option<&HashMap<String, String>>,
        given: Option<&Map<String, Value>>,
    ) -> Result<Config> {
        let origin = format!("{}: __metadata__", path.display());
        let Some(metadata) = metadata else { return Ok(Config::new(origin, Map::new(), given)) };
        if let Some(text) = metadata.get("cfg") {
            let file = parse_object(&format!("{origin} key cfg"), text.as_bytes())?;
            return Ok(Config::new(origin, file, given));
        }
        let flat = metadata.iter().map(|(k, v)| (k.clone(), literal(v))).collect();
        Ok(Config::new(origin, flat, given))
    }

    pub fn origin(&self) -> &str {
        &self.origin
    }

    pub fn into_file(self) -> Map<String, Value> {
        self.file
    }

    /// The caller's keys.
    pub fn options_alone(&self) -> Config {
        Config::new("the options' recipe".to_string(), self.given.clone(), None)
    }

    /// The file's keys.
    pub fn file_alone(&self) -> Config {
        Config::new(self.origin.clone(), self.file.clone(), None)
    }

    /// Whether the caller, not the file, states this key.
    pub fn is_given(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// The caller's value, else the file's, else the one in its `metadata` object. Null is absent.
    pub fn find(&self, key: &str) -> Option<&Value> {
        let places = [
            self.given.get(key),
            self.given.get("metadata").and_then(|m| m.get(key)),
            self.file.get(key),
            self.file.get("metadata").and_then(|m| m.get(key)),
        ];
        places.into_iter().flatten().find(|v| !v.is_null())
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.find(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.find(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.find(key) else { return Ok(None) };
        self.to_count(key, value).map(Some)
    }

    pub fn to_count(&self, key: &str, value: &Value) -> Result<usize> {
        match json::whole_number(value).and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(n),
            None => Err(self.wrong(key, value, "a whole number")),
        }
    }

    pub fn real(&self, key: &str) -> Result<Option<f64>> {
        match self.find(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(key, value, "a number")),
            },
        }
    }

    /// The value of a key that cannot be guessed.
    pub fn missing<T>(&self, key: &str, remedy: &str) -> Result<T> {
        bail!(RecipeIncomplete, "{}: the key {key} is missing; {remedy}", self.origin)
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        let origin = if self.is_given(key) { "the options" } else { &self.origin };
        let text = format!("{origin}: the key {key} is {value}; it must be {expected}");
        Error::new(Status::Format, text)
    }
}

/// A JSON object, or an error with its line and column.
pub(super) fn parse_object(origin: &str, text: &[u8]) -> Result<Map<String, Value>> {
    if text.len() > LIMIT {
        bail!(Format, "{origin}: {} bytes are no configuration: {LIMIT} at most", text.len());
    }
    match json::parse(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => bail!(Format, "{origin}: must be a JSON object of configuration keys"),
        Err(reason) => bail!(Format, "{origin}: {reason}"),
    }
}

/// A metadata string as the value it stands for; Python's str() of a bool or None counts.
fn literal(text: &str) -> Value {
    match text {
        "True" => Value::Bool(true),
        "False" => Value::Bool(false),
        "None" => Value::Null,
        _ => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string())),
    }
}
