//! What values the references of the active had, and in which order: a log to which every update is appended before it
//! can be seen and after it was made.
//!
//! The place of a line in the log is its time: appending is one system call, so that of two lines the one that was
//! written first is first. No clock is involved.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A place in the log, in bytes.
pub(crate) type At = u64;

/// What a reference that doesn't exist names.
pub(crate) const NONE: &str = "0000000000000000000000000000000000000000";

/// The log, while it grows.
pub(crate) struct Recorder(PathBuf);

/// What was recorded: for each repository and reference its values, in order.
pub(crate) struct History(BTreeMap<String, BTreeMap<String, Vec<Update>>>);

/// An update that took place between two places of the log.
struct Update {
    prepared: At,
    committed: At,
    new: String,
    by: String,
}

/// When a value could be seen, both ends included.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span(At, At);

impl Recorder {
    pub(crate) fn new(dir: &Path) -> Recorder {
        let log = dir.join("updates.log");
        fs::write(&log, "").unwrap();
        Recorder(log)
    }

    /// Has git record every update of a repository's references under `name`.
    pub(crate) fn install(&self, bare: &Path, name: &str) {
        let hook = bare.join("hooks/reference-transaction");
        fs::create_dir_all(hook.parent().unwrap()).unwrap();
        // The shell writes a line by one call; the parent is the git process, which tells transactions apart.
        let log = self.0.display();
        let script = format!("#!/bin/sh\nwhile read -r old new ref; do\n  echo \"$PPID $1 {name} $new $ref\" >>'{log}'\ndone\nexit 0\n");
        fs::write(&hook, script).unwrap();
        fs::set_permissions(&hook, Permissions::from_mode(0o755)).unwrap();
    }

    /// Now: all that was recorded so far is before.
    pub(crate) fn now(&self) -> At {
        fs::metadata(&self.0).unwrap().len()
    }

    /// Records updates that git doesn't make, around `update`; a value of [`NONE`] is a removal.
    pub(crate) fn around<T>(&self, repository: &str, new: &BTreeMap<String, String>, update: impl FnOnce() -> T) -> T {
        let by = format!("test-{:?}", std::thread::current().id()).replace(' ', "");
        let append = |state: &str| {
            let mut log = File::options().append(true).open(&self.0).unwrap();
            for (name, id) in new {
                log.write_all(format!("{by} {state} {repository} {id} {name}\n").as_bytes()).unwrap();
            }
        };
        append("prepared");
        let done = update();
        append("committed");
        done
    }

    /// All that was recorded; no writer may be at work.
    pub(crate) fn history(&self) -> History {
        History::parse(&fs::read_to_string(&self.0).unwrap())
    }
}

impl History {
    fn parse(log: &str) -> History {
        let mut all: BTreeMap<String, BTreeMap<String, Vec<Update>>> = BTreeMap::new();
        let mut at = 0;
        for line in log.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let &[by, state, repository, new, name] = fields.as_slice() else { panic!("a torn line: {line:?}") };
            let is_reference = name.starts_with("refs/") || name.starts_with("stash-refs/");
            if is_reference {
                let updates = all.entry(repository.into()).or_default().entry(name.into()).or_default();
                let open = updates.iter().rposition(|u| u.committed == At::MAX && u.by == by);
                match (state, open) {
                    ("prepared", _) => updates.push(Update { prepared: at, committed: At::MAX, new: new.into(), by: by.into() }),
                    ("committed", Some(open)) => updates[open].committed = at,
                    ("aborted", Some(open)) => drop(updates.remove(open)),
                    // Aborted before it was prepared, as a push that is refused.
                    ("aborted" | "preparing", None) => {}
                    _ => panic!("out of order: {line:?}"),
                }
            }
            at += line.len() as At + 1;
        }
        History(all)
    }

    pub(crate) fn updates(&self) -> usize {
        self.0.values().flat_map(BTreeMap::values).map(Vec::len).sum()
    }

    /// Whether the active had each of these references' values at some time within `from..=to`, each at its own.
    pub(crate) fn check_each(&self, repository: &str, seen: &BTreeMap<String, String>, from: At, to: At) -> Result<(), String> {
        for (name, value) in self.values(repository, seen) {
            if self.spans(repository, &name, &value, from, to).is_empty() {
                return Err(format!("{repository}: {name} was never {value} within {from}..={to}\n{}", self.tell(repository, &name)));
            }
        }
        Ok(())
    }

    /// Whether there is one instant within `from..=to` at which the active had all of these references' values.
    pub(crate) fn check_together(&self, repository: &str, seen: &BTreeMap<String, String>, from: At, to: At) -> Result<(), String> {
        self.check_each(repository, seen, from, to)?;
        let mut possible = vec![Span(from, to)];
        for (name, value) in self.values(repository, seen) {
            let own = self.spans(repository, &name, &value, from, to);
            let next = intersect(&possible, &own);
            if next.is_empty() {
                let told = self.tell(repository, &name);
                return Err(format!(
                    "{repository}: {name} was {value} only at {own:?}, the references before it only at {possible:?}\n{told}"
                ));
            }
            possible = next;
        }
        Ok(())
    }

    /// The seen references and those that must not be there.
    fn values(&self, repository: &str, seen: &BTreeMap<String, String>) -> Vec<(String, String)> {
        let known = self.0.get(repository).into_iter().flat_map(BTreeMap::keys);
        let names: BTreeSet<&String> = known.chain(seen.keys()).collect();
        names.into_iter().map(|name| (name.clone(), seen.get(name).map_or(NONE, String::as_str).to_string())).collect()
    }

    /// When a reference had a value: from the preparation of its update to the end of the next.
    fn spans(&self, repository: &str, name: &str, value: &str, from: At, to: At) -> Vec<Span> {
        let updates = self.0.get(repository).and_then(|r| r.get(name)).map_or(&[][..], Vec::as_slice);
        let ends = updates.iter().map(|u| u.committed).chain([At::MAX]);
        let begins = [(0, NONE)].into_iter().chain(updates.iter().map(|u| (u.prepared, u.new.as_str())));
        let all: Vec<Span> = begins.zip(ends).filter(|((_, v), _)| *v == value).map(|((begin, _), end)| Span(begin, end)).collect();
        intersect(&all, &[Span(from, to)])
    }

    fn tell(&self, repository: &str, name: &str) -> String {
        let updates = self.0.get(repository).and_then(|r| r.get(name)).map_or(&[][..], Vec::as_slice);
        updates.iter().map(|u| format!("  {}..{} {}\n", u.prepared, u.committed, u.new)).collect()
    }
}

/// What two sets of spans have in common.
fn intersect(a: &[Span], b: &[Span]) -> Vec<Span> {
    let mut common: Vec<Span> = Vec::new();
    for a in a {
        common.extend(b.iter().map(|b| Span(a.0.max(b.0), a.1.min(b.1))).filter(|s| s.0 <= s.1));
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn check(log: &str, seen: &[(&str, &str)], expected: bool) {
        let history = History::parse(log);
        let seen = seen.iter().map(|(name, id)| (name.to_string(), id.to_string())).collect();
        let result = history.check_together("r", &seen, 0, log.len() as At);
        assert_eq!(result.is_ok(), expected, "{seen:?}: {result:?}");
    }

    #[test]
    fn only_states_that_existed_pass() {
        let update = |n: u32, id: &str, name: &str| format!("{n} prepared r {id} {name}\n{n} committed r {id} {name}\n");
        let log =
            [update(1, A, "refs/heads/x"), update(2, A, "refs/heads/y"), update(3, B, "refs/heads/x"), update(4, NONE, "refs/heads/y")];
        let log = log.concat();
        check(&log, &[], true);
        check(&log, &[("refs/heads/x", A)], true);
        check(&log, &[("refs/heads/x", A), ("refs/heads/y", A)], true);
        check(&log, &[("refs/heads/x", B), ("refs/heads/y", A)], true);
        check(&log, &[("refs/heads/x", B)], true);
        check(&log, &[("refs/heads/y", A)], false); // x was there already
        check(&log, &[("refs/heads/x", A), ("refs/heads/y", B)], false);
        check(&log, &[("refs/heads/z", A)], false);
        let apart =
            [update(1, A, "refs/heads/x"), update(2, B, "refs/heads/x"), update(3, A, "refs/heads/y"), update(4, A, "refs/heads/x")];
        check(&apart.concat(), &[("refs/heads/x", A), ("refs/heads/y", A)], true);
        check(&apart[..3].concat(), &[("refs/heads/x", A), ("refs/heads/y", A)], false);
    }
}
