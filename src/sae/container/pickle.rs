//! Reads pickles as data. Nothing in a pickle runs here: the opcodes that build plain values are
//! carried out on values of our own, the few names that PyTorch's tensors and NumPy's numbers need
//! stand for themselves, and every other opcode or name is refused by its name.
//!
//! Opcodes: Python's pickletools. Names: torch.save of PyTorch 1.6 and later, NumPy 1 and 2.

use std::collections::HashSet;

use crate::error::{Error, Result, Status};
use crate::tensor::DType;

use super::Stored;

/// Larger pickles hold more than a state dict; a value takes up to 80 times its bytes here.
pub(super) const LIMIT: u64 = 512 << 10;
/// What a state dict may nest and hold.
const DEPTH: usize = 8;
const VISITS: usize = 10_000;
/// The longest string that is taken as a key's part or a value.
const TEXT: usize = 4096;
/// The largest array of NumPy whose elements are taken, in bytes: it lies within the pickle.
const ARRAY: usize = 256 << 10;
/// The longest joined key: a few short strings, recalled again and again, could make many long ones.
const PATH: usize = 1024;

/// A tensor that a pickle describes; its bytes lie elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PickledTensor<'p> {
    /// Which storage, by the key that names it in the archive.
    pub storage: &'p str,
    pub dtype: Stored,
    /// Elements of the storage.
    pub numel: u64,
    /// In elements of the storage.
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<usize>,
}

/// An array of NumPy, whose bytes lie in the pickle.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PickledArray {
    pub dtype: Stored,
    pub shape: Vec<usize>,
    /// The bytes are those of the transpose.
    pub turned: bool,
    pub bytes: Vec<u8>,
}

/// A leaf of the pickled dictionary.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Leaf<'p> {
    Tensor(PickledTensor<'p>),
    Array(PickledArray),
    Bool(bool),
    Int(i64),
    Real(f64),
    Text(&'p str),
    Null,
}

/// The leaves of a pickled dictionary, nested keys joined by dots, in its order. Lists and other
/// values that no checkpoint's reader asks for are left out.
pub(super) fn leaves(pickle: &[u8]) -> Result<Vec<(String, Leaf<'_>)>> {
    let mut machine = Machine::new(pickle);
    let Item::Dict(top) = machine.run()? else {
        return refuse("something else than a dictionary of tensors");
    };
    let mut walk = Walk {
        machine: &machine,
        path: String::new(),
        visits: 0,
        array_bytes: 0,
        found: Vec::new(),
    };
    walk.dict(top, 1)?;
    let found = walk.found;
    let mut paths = HashSet::with_capacity(found.len());
    match found.iter().find(|(path, _)| !paths.insert(path)) {
        Some((path, _)) => fault(&format!("the key {} is in it twice", shown(path))),
        None => Ok(found),
    }
}

/// What the machine holds. Containers are handles into it, as Python's are references.
#[derive(Clone, Debug)]
enum Item {
    Null,
    Bool(bool),
    Int(i64),
    /// Beyond 64 bits: never of use, but legal.
    LargeInt,
    Real(f64),
    Text(Span),
    Bytes(Blob),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Name(Name),
    Storage(usize),
    Tensor(usize),
    /// Of NumPy.
    Dtype(usize),
    Array(usize),
    /// Legal, and nothing that a reader asks for.
    Other,
}

/// A bytes object.
#[derive(Clone, Copy, Debug)]
enum Blob {
    Plain(Span),
    /// As protocol 2 writes it: text of one character for each byte.
    Latin1(Span),
}

/// Bytes of the pickle.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    end: usize,
}

/// The names that may be looked up.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Name {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Device,
    Dtype,
    Storage(Stored),
    NumpyScalar,
    NumpyDtype,
    NumpyArray,
    NumpyArrayClass,
    /// `_codecs.encode`: bytes from text.
    Encode,
    BytesClass,
}

impl Name {
    fn find(module: &str, name: &str) -> Option<Name> {
        const DTYPES: [&str; 11] = [
            "float32", "float16", "bfloat16", "float64", "bool", "uint8", "int8", "int16", "int32",
            "int64", "float",
        ];
        Some(match (module, name) {
            ("collections", "OrderedDict") => Name::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Name::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Name::RebuildParameter,
            ("torch", "Size") => Name::Size,
            ("torch", "device") => Name::Device,
            ("torch", dtype) if DTYPES.contains(&dtype) => Name::Dtype,
            ("torch", class) => Name::Storage(storage_class(class)?),
            ("numpy._core.multiarray" | "numpy.core.multiarray", "scalar") => Name::NumpyScalar,
            ("numpy._core.multiarray" | "numpy.core.multiarray", "_reconstruct") => {
                Name::NumpyArray
            }
            ("numpy", "dtype") => Name::NumpyDtype,
            ("numpy", "ndarray") => Name::NumpyArrayClass,
            ("_codecs", "encode") => Name::Encode,
            ("__builtin__" | "builtins", "bytes") => Name::BytesClass,
            _ => return None,
        })
    }
}

/// By the name of PyTorch's storage class.
fn storage_class(name: &str) -> Option<Stored> {
    Some(match name {
        "FloatStorage" => Stored::Float(DType::F32),
        "HalfStorage" => Stored::Float(DType::F16),
        "BFloat16Storage" => Stored::Float(DType::BF16),
        "DoubleStorage" => Stored::Float(DType::F64),
        "BoolStorage" => Stored::Bool,
        "ByteStorage" => Stored::U8,
        "CharStorage" => Stored::I8,
        "ShortStorage" => Stored::I16,
        "IntStorage" => Stored::I32,
        "LongStorage" => Stored::I64,
        _ => return None,
    })
}

struct Storage {
    key: Span,
    dtype: Stored,
    numel: u64,
}

/// Of NumPy: a letter for the kind, then the bytes of an element.
struct NumpyDtype {
    code: Span,
    big_endian: bool,
}

/// Of NumPy; made empty, and given its state later.
#[derive(Default)]
struct NumpyArray {
    dtype: Option<usize>,
    shape: Vec<usize>,
    fortran: bool,
    /// None for what is not made of numbers.
    bytes: Option<Blob>,
}

struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    stack: Vec<Item>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: Vec<Option<Item>>,
    /// Tuples and lists.
    sequences: Vec<Vec<Item>>,
    dicts: Vec<Vec<(Item, Item)>>,
    storages: Vec<Storage>,
    tensors: Vec<PickledTensor<'a>>,
    dtypes: Vec<NumpyDtype>,
    arrays: Vec<NumpyArray>,
}

impl<'a> Machine<'a> {
    fn new(pickle: &'a [u8]) -> Machine<'a> {
        Machine {
            pickle,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
            sequences: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            dtypes: Vec::new(),
            arrays: Vec::new(),
        }
    }

    /// The value that the pickle ends with.
    fn run(&mut self) -> Result<Item> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            // Protocol and framing.
            0x80 => match self.byte()? {
                2..=5 => Ok(()),
                other => fault(&format!("protocol {other} is not one of 2 to 5")),
            },
            0x95 => self.take(8).map(drop),
            // Plain values.
            b'N' => self.push(Item::Null),
            0x88 => self.push(Item::Bool(true)),
            0x89 => self.push(Item::Bool(false)),
            b'K' => self.number(1),
            b'M' => self.number(2),
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Item::Int(n.into()))
            }
            0x8a => {
                let len = self.byte()?;
                let int = long(self.take(len.into())?);
                self.push(int)
            }
            b'G' => {
                let x = f64::from_be_bytes(self.array()?);
                self.push(Item::Real(x))
            }
            b'X' => self.text(4),
            0x8c => self.text(1),
            0x8d => self.text(8),
            b'U' => self.text(1),
            b'T' => self.text(4),
            b'C' => self.bytes(1),
            b'B' => self.bytes(4),
            0x8e => self.bytes(8),
            // Containers.
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b')' => self.tuple(0),
            0x85 => self.tuple(1),
            0x86 => self.tuple(2),
            0x87 => self.tuple(3),
            b't' => {
                let n = self.above_mark()?;
                self.tuple(n)
            }
            b']' => self.sequence(Vec::new(), Item::List),
            b'l' => {
                let n = self.above_mark()?;
                let items = self.pop_many(n)?;
                self.sequence(items, Item::List)
            }
            b'a' => self.append(1),
            b'e' => {
                let n = self.above_mark()?;
                self.append(n)
            }
            b'}' => self.dict(Vec::new()),
            b'd' => {
                let n = self.above_mark()?;
                let pairs = pairs(self.pop_many(n)?)?;
                self.dict(pairs)
            }
            b's' => self.set_items(2),
            b'u' => {
                let n = self.above_mark()?;
                self.set_items(n)
            }
            // The stack and the memo.
            b'0' => self.pop().map(drop),
            b'1' => {
                let n = self.above_mark()?;
                self.pop_many(n).map(drop)
            }
            b'2' => {
                let top = self.top()?.clone();
                self.push(top)
            }
            0x94 => self.put(self.memo.len()),
            b'q' => {
                let slot = self.unsigned(1)?;
                self.put(slot)
            }
            b'r' => {
                let slot = self.unsigned(4)?;
                self.put(slot)
            }
            b'h' => self.get(1),
            b'j' => self.get(4),
            // Names, and what they are called with.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.name(module, name)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (module, name) {
                    (Item::Text(module), Item::Text(name)) => self.name(module, name),
                    _ => fault("STACK_GLOBAL without two strings"),
                }
            }
            b'Q' => self.persistent(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            other => refuse(&format!("the opcode {}", opcode_name(other))),
        }
    }

    // Reading.

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        match self.at.checked_add(len).and_then(|end| self.pickle.get(self.at..end)) {
            Some(bytes) => {
                self.at += len;
                Ok(bytes)
            }
            None => fault("it is cut off"),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// An unsigned number of up to eight bytes.
    fn unsigned(&mut self, len: usize) -> Result<usize> {
        let mut wide = [0; 8];
        wide[..len].copy_from_slice(self.take(len)?);
        match usize::try_from(u64::from_le_bytes(wide)) {
            Ok(n) => Ok(n),
            Err(_) => fault("a length is beyond memory"),
        }
    }

    fn span(&mut self, len_bytes: usize) -> Result<Span> {
        let len = self.unsigned(len_bytes)?;
        let start = self.at;
        self.take(len)?;
        Ok(Span { start, end: self.at })
    }

    /// Up to the end of the line.
    fn line(&mut self) -> Result<Span> {
        let start = self.at;
        while self.byte()? != b'\n' {}
        Ok(Span { start, end: self.at - 1 })
    }

    fn str(&self, span: Span) -> Result<&'a str> {
        if span.end - span.start > TEXT {
            return fault(&format!("a string is longer than {TEXT} bytes"));
        }
        match std::str::from_utf8(&self.pickle[span.start..span.end]) {
            Ok(text) => Ok(text),
            Err(_) => fault("a string is not UTF-8"),
        }
    }

    // Values.

    fn push(&mut self, item: Item) -> Result<()> {
        self.stack.push(item);
        Ok(())
    }

    fn pop(&mut self) -> Result<Item> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => Ok(self.stack.pop().unwrap_or(Item::Null)),
            false => fault("it takes a value from an empty stack"),
        }
    }

    fn top(&self) -> Result<&Item> {
        match self.stack.last() {
            Some(item) => Ok(item),
            None => fault("it looks at an empty stack"),
        }
    }

    /// Removes the latest mark; how many values lie above it.
    fn above_mark(&mut self) -> Result<usize> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.len() - mark),
            None => fault("it lacks a mark"),
        }
    }

    fn pop_many(&mut self, n: usize) -> Result<Vec<Item>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(n).filter(|start| *start >= floor) {
            Some(start) => Ok(self.stack.split_off(start)),
            None => fault("it takes more values than there are"),
        }
    }

    fn number(&mut self, len: usize) -> Result<()> {
        let n = self.unsigned(len)?;
        self.push(Item::Int(n as i64))
    }

    fn text(&mut self, len_bytes: usize) -> Result<()> {
        let span = self.span(len_bytes)?;
        self.push(Item::Text(span))
    }

    fn bytes(&mut self, len_bytes: usize) -> Result<()> {
        let span = self.span(len_bytes)?;
        self.push(Item::Bytes(Blob::Plain(span)))
    }

    fn sequence(&mut self, items: Vec<Item>, handle: fn(usize) -> Item) -> Result<()> {
        self.sequences.push(items);
        self.push(handle(self.sequences.len() - 1))
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let items = self.pop_many(n)?;
        self.sequence(items, Item::Tuple)
    }

    fn dict(&mut self, pairs: Vec<(Item, Item)>) -> Result<()> {
        self.dicts.push(pairs);
        self.push(Item::Dict(self.dicts.len() - 1))
    }

    fn append(&mut self, n: usize) -> Result<()> {
        let items = self.pop_many(n)?;
        match *self.top()? {
            Item::List(list) => {
                self.sequences[list].extend(items);
                Ok(())
            }
            _ => fault("it appends to what is no list"),
        }
    }

    fn set_items(&mut self, n: usize) -> Result<()> {
        let pairs = pairs(self.pop_many(n)?)?;
        match *self.top()? {
            Item::Dict(dict) => {
                self.dicts[dict].extend(pairs);
                Ok(())
            }
            _ => fault("it sets items of what is no dictionary"),
        }
    }

    fn put(&mut self, slot: usize) -> Result<()> {
        // Python numbers memo slots without gaps: none is beyond the opcodes that were read.
        if slot > self.at {
            return fault("a memo slot is out of range");
        }
        let item = self.top()?.clone();
        if slot >= self.memo.len() {
            self.memo.resize(slot + 1, None);
        }
        self.memo[slot] = Some(item);
        Ok(())
    }

    fn get(&mut self, len: usize) -> Result<()> {
        let slot = self.unsigned(len)?;
        match self.memo.get(slot).cloned().flatten() {
            Some(item) => self.push(item),
            None => fault("it recalls a value that it never stored"),
        }
    }

    // Names.

    fn name(&mut self, module: Span, name: Span) -> Result<()> {
        let (module, name) = (self.str(module)?, self.str(name)?);
        match Name::find(module, name) {
            Some(name) => self.push(Item::Name(name)),
            None => refuse(&format!("the name {}.{}", shown(module), shown(name))),
        }
    }

    /// ('storage', class, key, location, number of elements)
    fn persistent(&mut self) -> Result<()> {
        let Item::Tuple(id) = self.pop()? else { return fault("a persistent id is no tuple") };
        let [
            Item::Text(kind),
            Item::Name(Name::Storage(dtype)),
            Item::Text(key),
            _,
            Item::Int(numel),
        ] = self.sequences[id][..]
        else {
            return refuse("a persistent id that is not a tensor's storage");
        };
        if self.str(kind)? != "storage" {
            return refuse("a persistent id that is not a tensor's storage");
        }
        let Ok(numel) = u64::try_from(numel) else { return fault("a storage has a negative size") };
        self.storages.push(Storage { key, dtype, numel });
        self.push(Item::Storage(self.storages.len() - 1))
    }

    fn reduce(&mut self) -> Result<()> {
        let (Item::Tuple(args), Item::Name(name)) = (self.pop()?, self.pop()?) else {
            return refuse("a call of something else than a name");
        };
        let result = match (name, &self.sequences[args][..]) {
            (Name::OrderedDict, []) => return self.dict(Vec::new()),
            (Name::RebuildTensor, [storage, offset, shape, stride, ..]) => {
                let tensor = self.tensor(storage, offset, shape, stride)?;
                self.tensors.push(tensor);
                Item::Tensor(self.tensors.len() - 1)
            }
            (Name::RebuildParameter, [data @ Item::Tensor(_), ..]) => data.clone(),
            (Name::Size, [size]) => size.clone(),
            // Where a tensor was does not matter.
            (Name::Device, _) => Item::Null,
            (Name::Encode, [Item::Text(text), Item::Text(codec)]) => match self.str(*codec)? {
                "latin1" | "latin-1" => Item::Bytes(Blob::Latin1(*text)),
                other => return refuse(&format!("bytes by the codec {}", shown(other))),
            },
            (Name::BytesClass, []) => Item::Bytes(Blob::Plain(Span { start: 0, end: 0 })),
            (Name::NumpyDtype, [Item::Text(code), ..]) => {
                self.dtypes.push(NumpyDtype { code: *code, big_endian: false });
                Item::Dtype(self.dtypes.len() - 1)
            }
            (Name::NumpyScalar, [Item::Dtype(dtype), Item::Bytes(blob)]) => {
                self.scalar(*dtype, *blob)?
            }
            (Name::NumpyScalar, [Item::Dtype(_), _]) => Item::Other,
            (Name::NumpyArray, [Item::Name(Name::NumpyArrayClass), ..]) => {
                self.arrays.push(NumpyArray::default());
                Item::Array(self.arrays.len() - 1)
            }
            (name, _) => return refuse(&format!("a call of {name:?} with unknown arguments")),
        };
        self.push(result)
    }

    /// State of an OrderedDict: `_metadata` of a module, which says nothing of the values; and what
    /// NumPy's types and arrays are.
    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        let state = match state {
            Item::Tuple(items) => &self.sequences[items][..],
            _ => &[],
        };
        match (self.stack.last(), state) {
            (Some(Item::Dict(_)), _) => Ok(()),
            // (version, byte order, …)
            (Some(Item::Dtype(dtype)), [_, Item::Text(order), ..]) => {
                self.dtypes[*dtype].big_endian = self.str(*order)? == ">";
                Ok(())
            }
            // (version, shape, element type, column-major, elements)
            (
                Some(Item::Array(array)),
                [_, shape, Item::Dtype(dtype), Item::Bool(fortran), data],
            ) => {
                self.arrays[*array] = NumpyArray {
                    dtype: Some(*dtype),
                    shape: self.sizes(shape)?,
                    fortran: *fortran,
                    bytes: match data {
                        Item::Bytes(blob) => Some(*blob),
                        _ => None,
                    },
                };
                Ok(())
            }
            _ => refuse("the state of an object (opcode BUILD)"),
        }
    }

    /// The number that a scalar of NumPy is; texts and dates are left out.
    fn scalar(&self, dtype: usize, blob: Blob) -> Result<Item> {
        let dtype = &self.dtypes[dtype];
        let code = self.str(dtype.code)?;
        let Some(size) = code.get(1..).and_then(|size| size.parse::<usize>().ok()) else {
            return Ok(Item::Other);
        };
        if !matches!((&code[..1], size), ("f", 2 | 4 | 8) | ("i" | "u", 1 | 2 | 4 | 8) | ("b", 1)) {
            return Ok(Item::Other);
        }
        let Some(mut bytes) = self.blob(blob, size)? else {
            return fault("a number of NumPy has not as many bytes as its type");
        };
        if dtype.big_endian {
            bytes.reverse();
        }
        let negative = code.starts_with('i') && bytes.last().is_some_and(|top| top & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..size].copy_from_slice(&bytes);
        Ok(match (&code[..1], &bytes[..]) {
            ("f", &[a, b]) => Item::Real(half::f16::from_le_bytes([a, b]).into()),
            ("f", &[a, b, c, d]) => Item::Real(f32::from_le_bytes([a, b, c, d]).into()),
            ("f", _) => Item::Real(f64::from_le_bytes(wide)),
            ("b", _) => Item::Bool(wide[0] != 0),
            ("u", _) => match i64::try_from(u64::from_le_bytes(wide)) {
                Ok(n) => Item::Int(n),
                Err(_) => Item::LargeInt,
            },
            _ => Item::Int(i64::from_le_bytes(wide)),
        })
    }

    /// An array of numbers that PyTorch has too; none of others, which are left out.
    fn numpy_array(&self, array: &NumpyArray) -> Result<Option<PickledArray>> {
        let (Some(dtype), Some(blob)) = (array.dtype, array.bytes) else { return Ok(None) };
        let dtype = &self.dtypes[dtype];
        let stored = match self.str(dtype.code)? {
            "f8" => Stored::Float(DType::F64),
            "f4" => Stored::Float(DType::F32),
            "f2" => Stored::Float(DType::F16),
            "b1" => Stored::Bool,
            "u1" => Stored::U8,
            "i1" => Stored::I8,
            "i2" => Stored::I16,
            "i4" => Stored::I32,
            "i8" => Stored::I64,
            _ => return Ok(None),
        };
        if dtype.big_endian {
            return fault("an array of NumPy is big-endian");
        }
        let size = array.shape.iter().try_fold(stored.size(), |n, s| n.checked_mul(*s));
        let Some(size) = size.filter(|size| *size <= ARRAY) else {
            return fault(&format!(
                "an array of NumPy has more than {ARRAY} bytes: save tensors of PyTorch instead"
            ));
        };
        match self.blob(blob, size)? {
            Some(bytes) => Ok(Some(PickledArray {
                dtype: stored,
                turned: array.fortran && array.shape.len() > 1,
                shape: array.shape.clone(),
                bytes,
            })),
            None => fault("an array of NumPy has not as many bytes as its shape"),
        }
    }

    /// The bytes of an object that must have so many; none if it has not.
    fn blob(&self, blob: Blob, size: usize) -> Result<Option<Vec<u8>>> {
        let (Blob::Plain(span) | Blob::Latin1(span)) = blob;
        let raw = &self.pickle[span.start..span.end];
        if let Blob::Plain(_) = blob {
            return Ok((raw.len() == size).then(|| raw.to_vec()));
        }
        // A character up to 0xff has one or two bytes in UTF-8.
        if raw.len() < size || raw.len() > 2 * size {
            return Ok(None);
        }
        let Ok(text) = std::str::from_utf8(raw) else { return fault("a string is not UTF-8") };
        let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(c).ok()).collect();
        match bytes {
            Some(bytes) => Ok((bytes.len() == size).then_some(bytes)),
            None => fault("text that stands for bytes holds a character above 255"),
        }
    }

    fn tensor(
        &self,
        storage: &Item,
        offset: &Item,
        shape: &Item,
        stride: &Item,
    ) -> Result<PickledTensor<'a>> {
        let (Item::Storage(storage), Item::Int(offset)) = (storage, offset) else {
            return fault("a tensor lacks its storage");
        };
        let storage = &self.storages[*storage];
        let (shape, stride) = (self.sizes(shape)?, self.sizes(stride)?);
        let Ok(offset) = u64::try_from(*offset) else {
            return fault("a tensor begins before its storage");
        };
        if shape.len() != stride.len() {
            return fault("a tensor has not one stride for each dimension");
        }
        let mut last = Some(offset);
        for (n, s) in shape.iter().zip(&stride) {
            let step = (n.saturating_sub(1) as u64).checked_mul(*s as u64);
            last = last.zip(step).and_then(|(last, step)| last.checked_add(step));
        }
        let empty = shape.contains(&0);
        if !empty && last.is_none_or(|last| last >= storage.numel) {
            return fault("a tensor reaches beyond its storage");
        }
        let product = shape.iter().try_fold(storage.dtype.size(), |n, s| n.checked_mul(*s));
        if product.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return fault("a tensor is larger than memory");
        }
        let (key, dtype, numel) = (self.str(storage.key)?, storage.dtype, storage.numel);
        Ok(PickledTensor { storage: key, dtype, numel, offset, shape, stride })
    }

    /// A tuple of sizes or strides.
    fn sizes(&self, item: &Item) -> Result<Vec<usize>> {
        const DIMENSIONS: usize = 8;
        let Item::Tuple(items) = item else { return fault("a tensor's shape is no tuple") };
        let items = &self.sequences[*items];
        if items.len() > DIMENSIONS {
            return fault("a tensor has more than eight dimensions");
        }
        let size = |item: &Item| match item {
            Item::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        match items.iter().map(size).collect() {
            Some(sizes) => Ok(sizes),
            None => fault("a tensor's size or stride is negative, or no number"),
        }
    }
}

/// Follows the dictionaries below the top. References may make few values many: visits are counted.
struct Walk<'m, 'p> {
    machine: &'m Machine<'p>,
    path: String,
    visits: usize,
    /// Of all arrays so far: one that is recalled again and again could be many.
    array_bytes: usize,
    found: Vec<(String, Leaf<'p>)>,
}

impl Walk<'_, '_> {
    fn dict(&mut self, dict: usize, depth: usize) -> Result<()> {
        if depth > DEPTH {
            return fault(&format!("its dictionaries nest more than {DEPTH} deep"));
        }
        let machine = self.machine;
        for (key, value) in &machine.dicts[dict] {
            self.visits += 1;
            if self.visits > VISITS {
                return fault(&format!("it holds more than {VISITS} values"));
            }
            let before = self.path.len();
            if before > 0 {
                self.path.push('.');
            }
            match key {
                Item::Text(span) => self.path.push_str(machine.str(*span)?),
                Item::Int(n) => self.path.push_str(&n.to_string()),
                _ => return refuse("a dictionary whose keys are neither strings nor numbers"),
            }
            if self.path.len() > PATH {
                return fault(&format!("a key is longer than {PATH} bytes"));
            }
            self.value(value, depth)?;
            self.path.truncate(before);
        }
        Ok(())
    }

    fn value(&mut self, value: &Item, depth: usize) -> Result<()> {
        let leaf = match value {
            Item::Dict(dict) => return self.dict(*dict, depth + 1),
            Item::Tensor(tensor) => Leaf::Tensor(self.machine.tensors[*tensor].clone()),
            Item::Array(array) => match self.machine.numpy_array(&self.machine.arrays[*array])? {
                Some(array) => {
                    self.array_bytes += array.bytes.len();
                    if self.array_bytes > self.machine.pickle.len() {
                        return fault("its arrays of NumPy share their bytes");
                    }
                    Leaf::Array(array)
                }
                None => return Ok(()),
            },
            Item::Bool(b) => Leaf::Bool(*b),
            Item::Int(n) => Leaf::Int(*n),
            Item::Real(x) => Leaf::Real(*x),
            Item::Text(span) => Leaf::Text(self.machine.str(*span)?),
            Item::Null => Leaf::Null,
            _ => return Ok(()),
        };
        self.found.push((self.path.clone(), leaf));
        Ok(())
    }
}

/// Keys and values that lie one after the other.
fn pairs(items: Vec<Item>) -> Result<Vec<(Item, Item)>> {
    if !items.len().is_multiple_of(2) {
        return fault("a key has no value");
    }
    let mut pairs = Vec::with_capacity(items.len() / 2);
    let mut items = items.into_iter();
    while let (Some(key), Some(value)) = (items.next(), items.next()) {
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// A little-endian two's-complement number of any length.
fn long(bytes: &[u8]) -> Item {
    let negative = bytes.last().is_some_and(|top| top & 0x80 != 0);
    let fill = if negative { 0xff } else { 0 };
    if bytes.len() > 8 && bytes[8..].iter().any(|b| *b != fill) {
        return Item::LargeInt;
    }
    let mut wide = [fill; 8];
    let n = bytes.len().min(8);
    wide[..n].copy_from_slice(&bytes[..n]);
    let value = i64::from_le_bytes(wide);
    if bytes.len() > 8 && (value < 0) != negative { Item::LargeInt } else { Item::Int(value) }
}

/// What Python calls the opcodes that a refusal may have to name.
fn opcode_name(opcode: u8) -> String {
    let name = match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        0x82..=0x84 => "EXT",
        b'P' => "PERSID",
        b'I' => "INT",
        b'L' => "LONG",
        b'F' => "FLOAT",
        b'S' => "STRING",
        b'V' => "UNICODE",
        b'g' => "GET",
        b'p' => "PUT",
        0x8b => "LONG4",
        0x8f => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        0x96 => "BYTEARRAY8",
        0x97 => "NEXT_BUFFER",
        0x98 => "READONLY_BUFFER",
        _ => return format!("0x{opcode:02x}"),
    };
    name.to_string()
}

/// A name from the file, short and printable.
fn shown(name: &str) -> String {
    name.chars().take(80).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}

fn fault<T>(text: &str) -> Result<T> {
    Err(Error::new(Status::Format, format!("not a sound pickle: {text}")))
}

/// A command that writes the tensors, numbers and strings of any file of torch.save, also of a module
/// or of nested dictionaries, as what is read here.
pub(super) const REMEDY: &str = "python -c \"import sys, torch; \
    plain = lambda v: {k: plain(x) for k, x in v.items()} if isinstance(v, dict) \
    else plain(v.state_dict()) if hasattr(v, 'state_dict') \
    else v if isinstance(v, (torch.Tensor, int, float, str)) else None; \
    torch.save(plain(torch.load(sys.argv[1], 'cpu', weights_only=False)), sys.argv[2])\" OLD NEW";

fn refuse<T>(what: &str) -> Result<T> {
    Err(Error::new(
        Status::UnsafePickle,
        format!(
            "it asks for {what}, and only dictionaries of tensors, numbers and strings are read; \
             where running its code is safe, write it anew and give it its name: {REMEDY}"
        ),
    ))
}
