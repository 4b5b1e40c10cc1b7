//! What include/blockem.h declares. Reads only what cbindgen writes.

/// A function, struct or constant of the header, as far as the ABI depends on it.
pub struct Header {
    pub constants: Vec<(String, i64)>,
    pub structs: Vec<Struct>,
    /// Prototypes on one line.
    pub functions: Vec<Function>,
}

pub struct Struct {
    pub name: String,
    pub fields: Vec<Field>,
}

pub struct Field {
    pub name: String,
    /// The declaration without the name, such as "int64_t [4]".
    pub kind: String,
}

pub struct Function {
    pub name: String,
    pub prototype: String,
}

impl Header {
    pub fn parse(text: &str) -> Header {
        let text = without_comments(text);
        let (directives, code): (Vec<&str>, Vec<&str>) =
            text.lines().partition(|line| line.starts_with('#'));
        let mut header = Header {
            constants: directives.iter().filter_map(|line| constant(line)).collect(),
            structs: Vec::new(),
            functions: Vec::new(),
        };
        for declaration in declarations(&code.join("\n")) {
            if let Some(prototype) = declaration.strip_prefix("BLOCKEM_API ") {
                header.functions.push(function(prototype));
            } else if declaration.contains('{') {
                header.structs.push(structure(&declaration));
            }
        }
        header
    }

    /// The numbers of all statuses.
    pub fn statuses(&self) -> Vec<i64> {
        let statuses = self.constants.iter().filter(|(n, _)| n.starts_with("BLOCKEM_STATUS_"));
        statuses.map(|(_, number)| *number).collect()
    }
}

fn without_comments(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("/*") {
        out.push_str(before);
        rest = comment.split_once("*/").expect("a comment ends").1;
    }
    out.push_str(rest);
    let lines = out.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
    lines.filter(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect()
}

fn constant(directive: &str) -> Option<(String, i64)> {
    let mut words = directive.strip_prefix("#define ")?.split_whitespace();
    let (name, value) = (words.next()?, words.next()?.parse().ok()?);
    words.next().is_none().then(|| (name.to_owned(), value))
}

/// Declarations, each on one line without its semicolon.
fn declarations(code: &str) -> Vec<String> {
    let code = code.replace("extern \"C\" {", "");
    let (mut found, mut current, mut depth) = (Vec::new(), String::new(), 0);
    for c in code.chars() {
        match c {
            '}' if depth == 0 => continue, // closes extern "C"
            ';' if depth == 0 => {
                found.push(one_line(&std::mem::take(&mut current)));
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        current.push(c);
    }
    found
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn function(prototype: &str) -> Function {
    let (head, _) = prototype.split_once('(').expect("a function has arguments");
    let name = head.rsplit([' ', '*']).next().expect("a function has a name");
    Function { name: name.to_owned(), prototype: prototype.to_owned() }
}

fn structure(declaration: &str) -> Struct {
    let (_, body) = declaration.split_once('{').expect("a struct has a body");
    let (body, name) = body.rsplit_once('}').expect("a struct has a name");
    let fields = body.split(';').map(str::trim).filter(|field| !field.is_empty());
    Struct { name: name.trim().to_owned(), fields: fields.map(field).collect() }
}

fn field(declaration: &str) -> Field {
    let (plain, array) = match declaration.split_once('[') {
        Some((plain, length)) => (plain, format!(" [{length}")),
        None => (declaration, String::new()),
    };
    let at = plain.rfind([' ', '*']).expect("a field has a type") + 1;
    let kind = format!("{}{array}", plain[..at].trim_end());
    Field { name: plain[at..].to_owned(), kind }
}
