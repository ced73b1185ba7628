//! Rust source as tokens and paths: takes the text of one file and gives the paths that it names outside tests, with
//! their lines, and the test functions that it defines; it knows grammar only as far as that needs and never fails.

use std::collections::BTreeMap;

/// One token and the line that it starts on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Token {
    line: usize,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Word(String),
    /// `::`
    Sep,
    Sign(char),
    /// A string, a number or a character: its text never matters here.
    Literal,
}

/// A path as written: `crate::model::Flow` is `["crate", "model", "Flow"]`; a glob ends in `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    pub(crate) line: usize,
    pub(crate) segments: Vec<String>,
    /// The inline modules around it, outermost first.
    pub(crate) inside: Vec<String>,
    /// Named by a `use`.
    pub(crate) imported: bool,
}

/// What a file names outside its tests.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(crate) paths: Vec<Path>,
    /// Out-of-line modules that exist only in tests.
    pub(crate) test_modules: Vec<String>,
}

/// The paths of a file outside `#[cfg(test)]`.
pub(crate) fn names(text: &str) -> Names {
    let mut reader = Reader {
        tokens: tokens(text),
        at: 0,
    };
    let mut names = Names::default();
    // One entry per open brace: the name of the module that it opens, if it opens one.
    let mut open: Vec<Option<String>> = Vec::new();
    let mut imported = false;
    while let Some(token) = reader.peek(0).cloned() {
        match token.kind {
            Kind::Sign('#') if reader.attribute_is_test() => {
                reader.skip_attributes();
                names.test_modules.extend(reader.skip_item());
            }
            Kind::Sign('#') if reader.is_attribute() => reader.skip_attributes(),
            Kind::Sign('{') => {
                open.push(None);
                reader.at += 1;
            }
            Kind::Sign('}') => {
                open.pop();
                reader.at += 1;
            }
            Kind::Word(word) if word == "mod" => {
                let opens = reader
                    .peek(2)
                    .is_some_and(|after| after.kind == Kind::Sign('{'));
                if let (Some(Kind::Word(name)), true) = (reader.kind(1).cloned(), opens) {
                    open.push(Some(name));
                    reader.at += 3;
                } else {
                    reader.at += 1;
                }
            }
            Kind::Word(word) if word == "use" => {
                imported = true;
                reader.at += 1;
            }
            Kind::Word(_) if reader.starts_path() => {
                let inside: Vec<String> = open.iter().flatten().cloned().collect();
                for (line, segments) in reader.path() {
                    if imported || segments.len() > 1 {
                        names.paths.push(Path {
                            line,
                            segments,
                            inside: inside.clone(),
                            imported,
                        });
                    }
                }
            }
            Kind::Word(_) | Kind::Sep | Kind::Sign(_) | Kind::Literal => {
                imported &= token.kind != Kind::Sign(';');
                reader.at += 1;
            }
        }
    }
    names
}

/// Functions that a test runner would run: `#[test] fn name`, also with arguments or a runtime in front.
pub(crate) fn test_functions(text: &str) -> Vec<String> {
    let mut reader = Reader {
        tokens: tokens(text),
        at: 0,
    };
    let mut found = Vec::new();
    while reader.at < reader.tokens.len() {
        if !reader.is_attribute() {
            reader.at += 1;
            continue;
        }
        let mut marked = false;
        while reader.is_attribute() {
            marked |= reader
                .attribute_words()
                .first()
                .is_some_and(|(word, _)| word == "test")
                || reader
                    .attribute_words()
                    .iter()
                    .any(|(word, path)| *path && word == "test");
            reader.skip_attribute();
        }
        let words = (0..6).map_while(|ahead| match reader.kind(ahead) {
            Some(Kind::Word(word)) => Some(word.clone()),
            _ => None,
        });
        let words: Vec<String> = words.collect();
        let name = words
            .iter()
            .position(|word| word == "fn")
            .and_then(|at| words.get(at + 1));
        if let (true, Some(name)) = (marked, name) {
            found.push(name.clone());
        }
    }
    found
}

/// What each name that a `use` brings in stands for, so that `use std::time; time::Instant` is seen for what it is.
pub(crate) fn aliases(paths: &[Path]) -> BTreeMap<&str, &[String]> {
    paths
        .iter()
        .filter(|path| path.imported && path.segments.len() > 1)
        .filter_map(|path| Some((path.segments.last()?.as_str(), path.segments.as_slice())))
        .collect()
}

struct Reader {
    tokens: Vec<Token>,
    at: usize,
}

impl Reader {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead)
    }

    fn kind(&self, ahead: usize) -> Option<&Kind> {
        self.peek(ahead).map(|token| &token.kind)
    }

    fn before(&self) -> Option<&Kind> {
        self.at
            .checked_sub(1)
            .and_then(|at| self.tokens.get(at))
            .map(|token| &token.kind)
    }

    /// At `#[` or `#![`.
    fn is_attribute(&self) -> bool {
        self.kind(0) == Some(&Kind::Sign('#'))
            && (self.kind(1) == Some(&Kind::Sign('['))
                || self.kind(1) == Some(&Kind::Sign('!')) && self.kind(2) == Some(&Kind::Sign('[')))
    }

    /// The words of the attribute that we are at, each with whether a path leads to it.
    fn attribute_words(&self) -> Vec<(String, bool)> {
        let mut words = Vec::new();
        let mut depth = 0_usize;
        let mut after_sep = false;
        for token in self.tokens.iter().skip(self.at) {
            match &token.kind {
                Kind::Sign('[' | '(') => depth += 1,
                Kind::Sign(']' | ')') => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        break;
                    }
                }
                Kind::Word(word) => words.push((word.clone(), after_sep && depth == 1)),
                Kind::Sep | Kind::Sign(_) | Kind::Literal => {}
            }
            after_sep = token.kind == Kind::Sep;
        }
        words
    }

    fn attribute_is_test(&self) -> bool {
        let words = self.attribute_words();
        let has = |name: &str| words.iter().any(|(word, _)| word == name);
        self.is_attribute()
            && (words.len() == 1 && has("test")
                || has("cfg") && has("test") && !has("not") && !has("any"))
    }

    fn skip_attribute(&mut self) {
        self.at += if self.kind(1) == Some(&Kind::Sign('!')) {
            2
        } else {
            1
        };
        self.skip_group();
    }

    fn skip_attributes(&mut self) {
        while self.is_attribute() {
            self.skip_attribute();
        }
    }

    /// Steps over one token, or over everything between the bracket that we are at and its partner.
    fn skip_group(&mut self) {
        let mut depth = 0_usize;
        while let Some(kind) = self.kind(0) {
            match kind {
                Kind::Sign('(' | '[' | '{') => depth += 1,
                Kind::Sign(')' | ']' | '}') => depth = depth.saturating_sub(1),
                Kind::Word(_) | Kind::Sep | Kind::Sign(_) | Kind::Literal => {}
            }
            self.at += 1;
            if depth == 0 {
                return;
            }
        }
    }

    /// Steps over the item, statement, field or arm that an attribute stands on; names the module if it is `mod name;`.
    fn skip_item(&mut self) -> Option<String> {
        let first = match self.kind(0) {
            Some(Kind::Word(word)) => word.clone(),
            _ => String::new(),
        };
        let is_item = ITEM_WORDS.contains(&first.as_str());
        let mut module = None;
        while let Some(kind) = self.kind(0) {
            match kind {
                Kind::Sign('{') => {
                    self.skip_group();
                    return None;
                }
                Kind::Sign(';') => {
                    self.at += 1;
                    return module;
                }
                Kind::Sign(',') if !is_item => {
                    self.at += 1;
                    return None;
                }
                Kind::Sign('}' | ')' | ']') => return None,
                Kind::Word(word) if word == "mod" => {
                    if let Some(Kind::Word(name)) = self.kind(1) {
                        module = Some(name.clone());
                    }
                    self.at += 1;
                }
                Kind::Word(_) | Kind::Sep | Kind::Sign(_) | Kind::Literal => self.skip_group(),
            }
        }
        None
    }

    /// At the first word of a path, rather than behind a generic argument or a field's dot.
    fn starts_path(&self) -> bool {
        let earlier = self.at.checked_sub(2).and_then(|at| self.tokens.get(at));
        let earlier = earlier.map(|token| &token.kind);
        match self.before() {
            Some(Kind::Sep) => earlier != Some(&Kind::Sign('>')),
            Some(Kind::Sign('.')) => earlier == Some(&Kind::Sign('.')),
            _ => true,
        }
    }

    /// Reads the path that we are at, and every path of the group that it ends in.
    fn path(&mut self) -> Vec<(usize, Vec<String>)> {
        let mut found = Vec::new();
        self.path_under(&[], &mut found);
        found
    }

    fn path_under(&mut self, above: &[String], found: &mut Vec<(usize, Vec<String>)>) {
        let mut segments = above.to_vec();
        let mut line = self.peek(0).map_or(0, |token| token.line);
        loop {
            match self.kind(0) {
                Some(Kind::Word(word)) => {
                    line = self.peek(0).map_or(line, |token| token.line);
                    segments.push(word.clone());
                    self.at += 1;
                }
                Some(Kind::Sign('*')) if !segments.is_empty() => {
                    segments.push("*".to_owned());
                    self.at += 1;
                    break;
                }
                Some(Kind::Sign('{')) if !segments.is_empty() => {
                    self.group_under(&segments, found);
                    return;
                }
                _ => break,
            }
            if self.kind(0) != Some(&Kind::Sep) {
                break;
            }
            self.at += 1;
        }
        found.push((line, segments));
    }

    fn group_under(&mut self, above: &[String], found: &mut Vec<(usize, Vec<String>)>) {
        self.at += 1;
        while let Some(kind) = self.kind(0) {
            match kind {
                Kind::Sign('}') => {
                    self.at += 1;
                    return;
                }
                Kind::Word(word) if word == "as" => self.at += 2,
                Kind::Word(_) | Kind::Sign('*' | '{') => self.path_under(above, found),
                Kind::Sep | Kind::Sign(_) | Kind::Literal => self.at += 1,
            }
        }
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut lexer = Lexer {
        chars: text.chars().collect(),
        at: 0,
        line: 1,
    };
    let mut tokens = Vec::new();
    while let Some(c) = lexer.peek(0) {
        let line = lexer.line;
        let kind = match c {
            c if c.is_whitespace() => {
                lexer.bump();
                continue;
            }
            '/' if lexer.peek(1) == Some('/') => {
                lexer.skip_while(|c| c != '\n');
                continue;
            }
            '/' if lexer.peek(1) == Some('*') => {
                lexer.skip_block_comment();
                continue;
            }
            '"' => {
                lexer.skip_string();
                Kind::Literal
            }
            '\'' => match lexer.skip_quote() {
                true => Kind::Literal,
                false => continue,
            },
            c if c.is_ascii_digit() => {
                lexer.skip_while(|c| c.is_alphanumeric() || c == '_');
                Kind::Literal
            }
            c if c.is_alphabetic() || c == '_' => match lexer.word() {
                Some(word) => Kind::Word(word),
                None => Kind::Literal,
            },
            ':' if lexer.peek(1) == Some(':') => {
                lexer.bump();
                lexer.bump();
                Kind::Sep
            }
            c => {
                lexer.bump();
                Kind::Sign(c)
            }
        };
        tokens.push(Token { line, kind });
    }
    tokens
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    line: usize,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn bump(&mut self) -> Option<char> {
        let c = self.peek(0)?;
        self.at += 1;
        if c == '\n' {
            self.line += 1;
        }
        Some(c)
    }

    fn skip_while(&mut self, keep: impl Fn(char) -> bool) {
        while self.peek(0).is_some_and(&keep) {
            self.bump();
        }
    }

    fn skip_block_comment(&mut self) {
        let mut depth = 0_usize;
        while let Some(c) = self.bump() {
            match (c, self.peek(0)) {
                ('/', Some('*')) => {
                    self.bump();
                    depth += 1;
                }
                ('*', Some('/')) => {
                    self.bump();
                    depth -= 1;
                    if depth == 0 {
                        return;
                    }
                }
                _ => {}
            }
        }
    }

    fn skip_string(&mut self) {
        self.bump();
        while let Some(c) = self.bump() {
            match c {
                '\\' => {
                    self.bump();
                }
                '"' => return,
                _ => {}
            }
        }
    }

    /// At a quote: steps over a character and says so, or over the quote of a lifetime and its name.
    fn skip_quote(&mut self) -> bool {
        self.bump();
        if self.peek(0) == Some('\\') {
            self.bump();
            self.bump();
            self.skip_while(|c| c != '\'');
            self.bump();
            return true;
        }
        if self.peek(1) == Some('\'') {
            self.bump();
            self.bump();
            return true;
        }
        self.skip_while(|c| c.is_alphanumeric() || c == '_');
        false
    }

    /// A word, or none when it was the prefix of a string: `r"…"`, `b'…'`, `br#"…"#`, `c"…"`.
    fn word(&mut self) -> Option<String> {
        let start = self.at;
        self.skip_while(|c| c.is_alphanumeric() || c == '_');
        let word: String = self
            .chars
            .iter()
            .skip(start)
            .take(self.at - start)
            .collect();
        if !matches!(word.as_str(), "r" | "b" | "br" | "c" | "cr") {
            return Some(word);
        }
        match self.peek(0) {
            Some('\'') if word == "b" => {
                self.skip_quote();
                None
            }
            Some('"') if !word.contains('r') => {
                self.skip_string();
                None
            }
            Some('"' | '#') if word.contains('r') => self.raw(word),
            _ => Some(word),
        }
    }

    /// Behind `r`: a raw string, or a raw word.
    fn raw(&mut self, word: String) -> Option<String> {
        let mut hashes = 0_usize;
        while self.peek(hashes) == Some('#') {
            hashes += 1;
        }
        if self.peek(hashes) != Some('"') {
            if hashes == 1 && self.peek(1).is_some_and(char::is_alphabetic) {
                self.bump();
                return self.word();
            }
            return Some(word);
        }
        for _ in 0..=hashes {
            self.bump();
        }
        while let Some(c) = self.bump() {
            if c == '"' && (0..hashes).all(|ahead| self.peek(ahead) == Some('#')) {
                (0..hashes).for_each(|_| {
                    self.bump();
                });
                return None;
            }
        }
        None
    }
}

/// Words that start an item, which ends at its braces or its semicolon rather than at a comma.
const ITEM_WORDS: [&str; 14] = [
    "async",
    "const",
    "enum",
    "extern",
    "fn",
    "impl",
    "macro_rules",
    "mod",
    "pub",
    "static",
    "struct",
    "trait",
    "type",
    "use",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        let paths = names(text).paths;
        paths
            .iter()
            .map(|path| format!("{}:{}", path.line, path.segments.join("::")))
            .collect()
    }

    #[test]
    fn groups_are_unfolded_and_renames_dropped() {
        let text = "use crate::{model::{Flow as F, addr::*}, wire};\nuse std::io;";
        let expected = [
            "1:crate::model::Flow",
            "1:crate::model::addr::*",
            "1:crate::wire",
            "2:std::io",
        ];
        assert_eq!(paths(text), expected);
    }

    #[test]
    fn comments_strings_and_characters_name_nothing() {
        let text = r##"
            // crate::a
            /* crate::b /* crate::c */ crate::d */
            const S: &str = "crate::e \" crate::f";
            const R: &str = r#"crate::g "crate::h"#;
            const C: [char; 3] = ['"', '\'', '{'];
            fn life<'a>(x: &'a u8) -> &'a u8 { x }
            static X: u8 = crate::i::J;
        "##;
        assert_eq!(paths(text), ["8:crate::i::J"]);
    }

    #[test]
    fn what_is_only_for_tests_is_left_out() {
        let text = "
            #[cfg(test)] use crate::a::A;
            #[cfg(test)] mod fakes;
            struct S { #[cfg(test)] x: crate::b::B, y: crate::c::C }
            #[cfg(test)] #[derive(Debug)] fn f<A, B>(a: A) -> crate::d::D { crate::e::E }
            #[cfg(not(test))] fn g() { crate::f::F }
            #[cfg(test)]
            mod tests { use crate::g::G; mod deeper { use crate::h::H; } }
            fn after() { crate::i::I }";
        assert_eq!(
            paths(text),
            ["4:crate::c::C", "6:crate::f::F", "9:crate::i::I"]
        );
        assert_eq!(names(text).test_modules, ["fakes"]);
    }

    #[test]
    fn a_path_knows_its_inline_modules() {
        let all = names("mod a { mod b { fn f() { super::super::c() } } } fn g() { self::d() }");
        let inside: Vec<_> = all.paths.iter().map(|path| path.inside.join("/")).collect();
        assert_eq!(inside, ["a/b", ""]);
    }

    #[test]
    fn generics_fields_and_ranges_do_not_hide_paths() {
        let text =
            "fn f() { Vec::<crate::a::A>::new(); x.y::<B>(); S { ..crate::c::C }; $crate::d!() }";
        assert_eq!(
            paths(text),
            ["1:crate::a::A", "1:crate::c::C", "1:crate::d"]
        );
    }

    #[test]
    fn test_functions_are_found_by_their_attribute() {
        let text = "
            #[test] fn plain() {}
            #[tokio::test(start_paused = true)] #[expect(x, reason = \"y\")] async fn timed() {}
            proptest! { #[test] fn generated(x in 0..3) {} }
            #[cfg(test)] fn helper() {}
            fn test() {}
            // #[test] fn commented() {}";
        assert_eq!(test_functions(text), ["plain", "timed", "generated"]);
    }

    #[test]
    fn a_name_stands_for_what_it_was_imported_as() {
        let names = names("use std::time; fn f() { a::fs::x() }");
        let aliases = aliases(&names.paths);
        assert_eq!(aliases.len(), 1);
        assert_eq!(aliases["time"], ["std", "time"]);
    }
}
