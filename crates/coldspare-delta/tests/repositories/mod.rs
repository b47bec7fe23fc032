//! Repositories that git writes: a history of texts, each push of it a pack.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

pub(crate) const PUSHES: usize = 40;

pub(crate) fn git(dir: &Path, args: &[&str]) -> String {
    git_with_input(dir, args, "")
}

pub(crate) fn git_with_input(dir: &Path, args: &[&str], input: &str) -> String {
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).args(["-c", "gc.auto=0", "-c", "pack.threads=1"]).args(args);
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn pack_names(repository: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(repository.join("objects/pack")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".pack"));
    names.sort();
    names
}

pub(crate) fn init(repository: &Path, kind: &str, format: &str) {
    git(Path::new("/"), &["init", "-q", kind, "--object-format", format, "-b", "main", repository.to_str().unwrap()]);
    // A push of few objects would be unpacked.
    git(repository, &["config", "receive.unpackLimit", "1"]);
}

/// A bare repository that holds a pack for each of many pushes.
pub(crate) fn grow(bare: &Path, format: &str) {
    let work = bare.with_extension("work");
    init(&work, "--quiet", format);
    init(bare, "--bare", format);
    let mut texts = Texts::new();
    for push in 0..PUSHES {
        git_with_input(&work, &["fast-import", "--quiet"], &texts.commit(push));
        git(&work, &["push", "-q", bare.to_str().unwrap(), "main"]);
    }
}

/// Files of words that change a little with each push.
struct Texts {
    state: u64,
    files: Vec<Vec<String>>,
}

impl Texts {
    fn new() -> Texts {
        Texts { state: 0x5eed, files: Vec::new() }
    }

    fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 16) as usize % end
    }

    fn line(&mut self) -> String {
        (0..8).fold(String::new(), |mut line, _| {
            write!(line, "{:x} ", self.below(30_000)).unwrap();
            line
        })
    }

    /// The next commit, for `git fast-import`.
    fn commit(&mut self, number: usize) -> String {
        let first = self.files.len();
        for _ in 0..if first == 0 { 60 } else { 4 } {
            let lines = 20 + self.below(300);
            let file = (0..lines).map(|_| self.line()).collect();
            self.files.push(file);
        }
        let mut changed: Vec<usize> = (first..self.files.len()).collect();
        for _ in 0..12 {
            let file = self.below(self.files.len());
            let (at, line) = (self.below(self.files[file].len()), self.line());
            self.files[file][at] = line;
            let line = self.line();
            self.files[file].push(line);
            changed.push(file);
        }
        let mut out = format!("commit refs/heads/main\ncommitter T <t@example.com> {} +0000\ndata 1\nx\n", 1_700_000_000 + number);
        if number > 0 {
            out.push_str("from refs/heads/main^0\n");
        }
        for file in changed {
            let text = self.files[file].join("\n");
            writeln!(out, "M 100644 inline folder{}/file{file}\ndata {}\n{text}", file % 7, text.len()).unwrap();
        }
        out
    }
}
