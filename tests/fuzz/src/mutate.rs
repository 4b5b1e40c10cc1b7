//! Changes that keep the outer form of an input sound: members of an archive are changed and the
//! archive is written anew, a safetensors header keeps its length right, JSON stays JSON. Some are
//! the fuzzer's own, of any byte.

use libfuzzer_sys::fuzzer_mutate;
use serde_json::{Value, json};

use crate::archive::{Member, unzip, zip};
use crate::targets::LAYOUTS;

/// The words of the formats; those with escapes are the fuzzer's alone.
const WORDS: &str = include_str!("../words.dict");
/// Members and tensors stay below this.
const LARGEST: usize = 64 << 10;

/// Carries a change of a whole input out on the fuzzer's buffer; one that does not fit is none.
pub fn within(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    change: impl FnOnce(&[u8]) -> Option<Vec<u8>>,
) -> usize {
    match change(&data[..size]).filter(|changed| changed.len() <= max_size) {
        Some(changed) => {
            data[..changed.len()].copy_from_slice(&changed);
            changed.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
}

/// A file of weights; none asks for the fuzzer's own change.
pub fn weights(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut random = Random::new(seed);
    if random.one_in(10) {
        return None;
    }
    if let Some(mut members) = unzip(bytes) {
        change_members(&mut members, &mut random);
        return Some(zip(&members));
    }
    change_safetensors(bytes, &mut random)
}

/// A folder as [`crate::targets::folder`] reads it.
pub fn folder(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut random = Random::new(seed);
    let (head, text) = bytes.split_first_chunk::<2>()?;
    let mut head = *head;
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    let (mut config, mut rest) = (text[..end].to_vec(), text[end..].to_vec());
    match random.below(10) {
        0 => head = [random.below(LAYOUTS.len()) as u8, random.below(6) as u8],
        1 if rest.len() > 1 => {
            rest.splice(1.., weights(&rest[1..], seed)?);
        }
        2 => config = freely(&config, &mut random),
        _ => config = change_json(&config, &mut random)?,
    }
    Some([&head[..], &config, &rest].concat())
}

/// A K0.json, an index of weights, a tokenizer.json.
pub fn json(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut random = Random::new(seed);
    if random.one_in(4) { None } else { change_json(bytes, &mut random) }
}

fn change_members(members: &mut Vec<Member>, random: &mut Random) {
    if members.is_empty() {
        members.push(Member::stored("archive/data.pkl", b"\x80\x02}."));
    }
    let pickle = members.iter().position(|m| m.name.ends_with("data.pkl"));
    let any = random.below(members.len());
    let at = pickle.filter(|_| !random.one_in(3)).unwrap_or(any);
    match random.below(12) {
        0 => members[at].deflated ^= true,
        1 => drop(members.remove(at)),
        2 => members.push(members[at].clone()),
        3 => {
            let name = freely(members[at].name.as_bytes(), random);
            members[at].name = String::from_utf8_lossy(&name).into_owned();
        }
        4 => {
            let word = random.word().to_string();
            members[at].name =
                if members[at].name.ends_with(".npy") { word + ".npy" } else { word };
        }
        5 => {
            let len = random.size().min(LARGEST);
            members[any].bytes.resize(len, 0);
        }
        _ if members[at].name.ends_with(".npy") => change_npy(&mut members[at].bytes, random),
        _ => members[at].bytes = freely(&members[at].bytes, random),
    }
}

/// The header of a NumPy array, its length kept right; often the elements then fit its shape.
fn change_npy(bytes: &mut Vec<u8>, random: &mut Random) {
    let header = bytes.get(8..10).map(|b| u16::from_le_bytes([b[0], b[1]]) as usize);
    let Some(header) = header.filter(|n| bytes.len() >= 10 + n && !random.one_in(8)) else {
        *bytes = freely(bytes, random);
        return;
    };
    let text = bytes[10..10 + header].to_vec();
    let mut text = if random.one_in(2) { text } else { freely(&text, random) };
    text.truncate(u16::MAX as usize);
    let shape = text.iter().position(|b| *b == b'(').map(|at| &text[at..]);
    let sizes = shape.map(|shape| {
        let end = shape.iter().position(|b| *b == b')').unwrap_or(shape.len());
        let text = String::from_utf8_lossy(&shape[1..end]).into_owned();
        text.split(',').filter_map(|n| n.trim().parse::<usize>().ok()).collect::<Vec<_>>()
    });
    let mut data = bytes.split_off(10 + header);
    let width = [4, 2, 8, 1][random.below(4)];
    let fit = sizes.unwrap_or_default().iter().try_fold(width, |n: usize, s| n.checked_mul(*s));
    if let Some(len) = fit.filter(|len| *len <= LARGEST && !random.one_in(3)) {
        data.resize(len, 0x3c);
    }
    bytes.truncate(8);
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text);
    bytes.extend(data);
}

/// The header of a safetensors file, its length kept right; often the tensors' bytes too.
fn change_safetensors(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (text, data) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let text = match random.one_in(4) {
        true => freely(text, random),
        false => change_json(text, random)?,
    };
    let mut data = data.to_vec();
    if !random.one_in(4) {
        let header: Option<Value> = serde_json::from_slice(&text).ok();
        let ends = header.as_ref().and_then(Value::as_object).into_iter().flatten();
        let end = ends.filter_map(|(_, info)| info["data_offsets"][1].as_u64()).max();
        data.resize((end.unwrap_or(0) as usize).min(LARGEST), 0x3c);
    }
    Some([&(text.len() as u64).to_le_bytes()[..], &text, &data].concat())
}

/// One value or key of a JSON text.
fn change_json(text: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(text).ok()?;
    for _ in 0..=random.below(3) {
        let mut left = random.below(count(&value));
        change_value(&mut value, &mut left, random);
    }
    Some(value.to_string().into_bytes())
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// Changes the value that comes `left` values later; true when that was done.
fn change_value(value: &mut Value, left: &mut usize, random: &mut Random) -> bool {
    if *left == 0 {
        change_this(value, random);
        return true;
    }
    *left -= 1;
    match value {
        Value::Array(list) => list.iter_mut().any(|v| change_value(v, left, random)),
        Value::Object(map) => map.values_mut().any(|v| change_value(v, left, random)),
        _ => false,
    }
}

fn change_this(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(map) if !random.one_in(8) => {
            let keys: Vec<String> = map.keys().cloned().collect();
            let some = if keys.is_empty() { String::new() } else { random.pick(&keys).clone() };
            let removed = if random.one_in(2) { map.shift_remove(&some) } else { None };
            if removed.is_none() || random.one_in(2) {
                let new = removed.unwrap_or_else(|| random.value());
                map.insert(random.word().to_string(), new);
            }
        }
        Value::Array(list) if !random.one_in(8) => match random.below(4) {
            0 => drop(list.pop()),
            1 => list.extend(list.last().cloned()),
            2 => list.reverse(),
            _ => list.push(random.value()),
        },
        Value::String(text) if random.one_in(3) => {
            let changed = freely(text.as_bytes(), random);
            *text = String::from_utf8_lossy(&changed).into_owned();
        }
        Value::Number(n) if random.one_in(2) => {
            let near = n.as_i64().unwrap_or(0).wrapping_add(random.below(5) as i64 - 2);
            *value = json!(near);
        }
        _ => *value = random.value(),
    }
}

/// The fuzzer's own change of any bytes.
fn freely(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let most = bytes.len() + 1 + random.below(64);
    let mut buffer = bytes.to_vec();
    buffer.resize(most, 0);
    let len = fuzzer_mutate(&mut buffer, bytes.len(), most);
    buffer.truncate(len);
    buffer
}

/// The same choices for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u32) -> Random {
        Random(u64::from(seed) << 1 | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn word(&mut self) -> &'static str {
        let plain = |line: &'static str| {
            let word = line.strip_prefix('"')?.strip_suffix('"')?;
            (!word.contains('\\')).then_some(word)
        };
        let words: Vec<&str> = WORDS.lines().filter_map(plain).collect();
        words[self.below(words.len())]
    }

    fn size(&mut self) -> usize {
        *self.pick(&[0, 1, 2, 4, 5, 8, 24, 48, 96, 144, 4096, 1 << 20])
    }

    fn value(&mut self) -> Value {
        match self.below(12) {
            0 => Value::Null,
            1 => json!(self.one_in(2)),
            2 => json!({}),
            3 => json!([]),
            4 => {
                let mut nested = json!(1);
                for _ in 0..self.below(140) {
                    nested = json!([nested]);
                }
                nested
            }
            5 | 6 => self.word().into(),
            7 => json!(*self.pick(&[0.5, -0.5, 1e-320, 1e308, -1e308, 1e39, 0.0, -0.0])),
            8 => json!(*self.pick(&[u64::MAX, 1 << 63, 1 << 53, 1 << 40, 1 << 32])),
            9 => json!(*self.pick(&[i64::MIN, -1, i64::MAX])),
            10 => {
                Value::Object([(self.word().to_string(), json!(self.word()))].into_iter().collect())
            }
            _ => json!(self.size()),
        }
    }
}
