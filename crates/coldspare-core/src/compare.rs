//! Where two hosts' trees differ, found by digests of stretches of keys: range-based set reconciliation (Meyer 2023).
//!
//! One side asks what the other has within some spans; the answer cuts each of them into parts and gives the digest of
//! each. Parts of which both have the same digest are done, the others are asked about next; a part of one entry names
//! where the trees differ. Decides what to ask and what follows from the answers; it must not know stores or links.
//!
//! Invariants: what is left out takes part on neither side; questions are disjoint, so that an answer costs the other side
//! one pass over its tree at most; at most [`ROUNDS_MAX`] questions.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::entry::Digest;
use crate::fingerprint::Fingerprint;
use crate::id::RootId;
use crate::key;
use crate::path::RelPath;
use crate::seeded_bug;

/// LIMIT: spans of one question.
pub const SPANS_MAX: usize = 16;
/// LIMIT: parts of one span; there are at least half as many where there are so many entries.
pub const PARTS_MAX: usize = 128;
/// LIMIT: questions of one comparison; at the limit what is left counts as more differences.
pub const ROUNDS_MAX: u32 = 64;
/// LIMIT: differences that are named.
pub const DIFFERENCES_MAX: usize = 100;
/// LIMIT: paths that are left out one by one, and their bytes; beyond, the folders that they are in are.
pub const LEFT_OUT_MAX: usize = 1024;
const LEFT_OUT_BYTES_MAX: usize = 256 << 10;
/// LIMIT: bytes of keys in one answer, but for the first span's: what doesn't fit is asked once more.
const ANSWER_BYTES_MAX: usize = 256 << 10;

/// A stretch of keys ([`key`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Its first key, or one before that.
    #[serde(with = "codec::bytes")]
    pub from: Vec<u8>,
    /// The first key behind it; empty: it goes on to the last.
    #[serde(with = "codec::bytes")]
    pub to: Vec<u8>,
}

/// A part of a span, up to where the next one starts; the first one has all before it too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The key of its first entry.
    #[serde(with = "codec::bytes")]
    pub first: Vec<u8>,
    /// What is in it.
    pub tally: Tally,
}

/// A span in parts, in order; none where nothing is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// At most [`PARTS_MAX`].
    #[serde(deserialize_with = "codec::capped::<_, _, PARTS_MAX>")]
    pub parts: Vec<Part>,
}

/// How many entries are in a span, and their digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Entries.
    pub entries: u64,
    /// As that of a whole tree ([`Fingerprint`]).
    pub digest: Digest,
}

/// What of a tree isn't compared, since the other side may have it otherwise for a good reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The root that holds `path`.
    pub root: RootId,
    /// The path.
    pub path: RelPath,
    /// How much of it.
    pub extent: Extent,
}

/// How much of a path is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Extent {
    /// Its own entry.
    Itself,
    /// All below it too.
    All,
}

/// A difference of the two trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The root that holds `path`.
    pub root: RootId,
    /// The path.
    pub path: RelPath,
    /// What of it.
    pub how: How,
}

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Only the side that asks has it.
    OnlyHere,
    /// Only the side that answers has it.
    OnlyThere,
    /// Both have it, with other attributes or content.
    Differs,
}

/// A tree at one point, as its store has it, without what is left out.
pub trait Tree {
    /// The store failed.
    type Error;

    /// Calls `each` with the keys of the entries in `span`, in order, until it says `false`.
    ///
    /// # Errors
    /// The store's.
    fn keys(&self, span: &Span, each: &mut dyn FnMut(&[u8]) -> bool) -> Result<(), Self::Error>;

    /// As [`Tree::keys`], with the encoded entries.
    ///
    /// # Errors
    /// The store's.
    fn entries(&self, span: &Span, each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Self::Error>;

    /// All of it in parts, where that is known already; they have to be those that [`Tree::tallies`] would count.
    fn whole(&self) -> Option<&Cut> {
        None
    }

    /// What is in each of these; a store that can does it in parallel.
    ///
    /// # Errors
    /// The store's.
    fn tallies(&self, spans: &[Span]) -> Result<Vec<Tally>, Self::Error> {
        spans.iter().map(|span| tally(self, span)).collect()
    }
}

impl Span {
    /// All keys.
    pub fn all() -> Span {
        Span { from: Vec::new(), to: Vec::new() }
    }

    /// Whether `key` is before its end.
    pub fn is_before_end(&self, key: &[u8]) -> bool {
        self.to.is_empty() || key < self.to.as_slice()
    }

    /// Whether spans are in order and disjoint, and none is empty.
    pub fn are_disjoint(spans: &[Span]) -> bool {
        spans.iter().all(|span| span.is_before_end(&span.from))
            && spans.windows(2).all(|two| !two[0].to.is_empty() && two[0].to <= two[1].from)
    }
}

/// What is in a span of a tree.
///
/// # Errors
/// The store's.
pub fn tally<T: Tree + ?Sized>(tree: &T, span: &Span) -> Result<Tally, T::Error> {
    let (mut fingerprint, mut entries) = (Fingerprint::default(), 0);
    tree.entries(span, &mut |key, entry| {
        fingerprint.add_encoded(key, entry);
        entries += 1;
        true
    })?;
    Ok(Tally { entries, digest: fingerprint.finish() })
}

/// Answers a question: cuts its spans, all of them or as many as fit into an answer.
///
/// Cost: two passes over what is in the spans.
///
/// # Errors
/// The store's.
pub fn answer<T: Tree>(tree: &T, spans: &[Span]) -> Result<Vec<Cut>, T::Error> {
    if let Some(whole) = tree.whole().filter(|_| *spans == [Span::all()]) {
        return Ok(vec![whole.clone()]);
    }
    let (mut firsts, mut bytes) = (Vec::new(), 0);
    for span in spans {
        let mine = cut(tree, span)?;
        bytes += mine.iter().map(Vec::len).sum::<usize>();
        if bytes > ANSWER_BYTES_MAX && !firsts.is_empty() {
            break;
        }
        firsts.push(mine);
    }
    let parts: Vec<Span> = spans.iter().zip(&firsts).flat_map(|(span, firsts)| parts_of(span, firsts)).collect();
    let mut tallies = tree.tallies(&parts)?.into_iter();
    let part = |first| tallies.next().map(|tally| Part { first, tally });
    let cuts = firsts.into_iter().scan(part, |part, firsts| Some(Cut { parts: firsts.into_iter().filter_map(part).collect() }));
    Ok(cuts.collect())
}

/// The keys at which a span is cut into parts of as many entries each.
fn cut<T: Tree>(tree: &T, span: &Span) -> Result<Vec<Vec<u8>>, T::Error> {
    let mut firsts: Vec<Vec<u8>> = Vec::new();
    let (mut every, mut count) = (1u64, 0u64);
    tree.keys(span, &mut |key| {
        if count.is_multiple_of(every) {
            if firsts.len() == PARTS_MAX {
                let mut n = 0;
                firsts.retain(|_| {
                    n += 1;
                    n % 2 == 1
                });
                every *= 2;
            }
            if count.is_multiple_of(every) {
                firsts.push(key.to_vec());
            }
        }
        count += 1;
        true
    })?;
    Ok(firsts)
}

/// The spans of the parts that start at `firsts`; all of the span where there are none.
fn parts_of(span: &Span, firsts: &[Vec<u8>]) -> Vec<Span> {
    let mut from = span.from.clone();
    let mut parts = Vec::with_capacity(firsts.len());
    for next in firsts.iter().skip(1) {
        parts.push(Span { from: std::mem::replace(&mut from, next.clone()), to: next.clone() });
    }
    if !firsts.is_empty() {
        parts.push(Span { from, to: span.to.clone() });
    }
    parts
}

/// The side that asks.
#[derive(Debug)]
pub struct Comparison {
    todo: Vec<Span>,
    asked: Vec<Span>,
    rounds: u32,
    entries: u64,
    differences: Vec<Difference>,
    has_more: bool,
}

/// An answer that leads nowhere.
#[derive(Debug, PartialEq, Eq)]
pub enum AnswerError<E> {
    /// It is none to what was asked.
    Protocol(&'static str),
    /// The store failed.
    Store(E),
}

impl Default for Comparison {
    fn default() -> Comparison {
        let (asked, differences) = (Vec::new(), Vec::new());
        Comparison { todo: vec![Span::all()], asked, rounds: 0, entries: 0, differences, has_more: false }
    }
}

impl Comparison {
    /// The next question; `None` once nothing more is to be asked.
    pub fn ask(&mut self) -> Option<&[Span]> {
        self.has_more |= self.differences.len() >= DIFFERENCES_MAX && !self.todo.is_empty();
        self.has_more |= self.rounds >= ROUNDS_MAX && !self.todo.is_empty();
        if self.has_more || self.todo.is_empty() {
            return None;
        }
        self.rounds += 1;
        // The last first: what is found is named before more is looked for.
        self.asked = self.todo.split_off(self.todo.len().saturating_sub(SPANS_MAX));
        self.asked.sort_by(|a, b| a.from.cmp(&b.from));
        Some(&self.asked)
    }

    /// Takes the answer to the last question, and compares it with the tree `here`.
    ///
    /// # Errors
    /// `Protocol`: it doesn't answer that question. `Store`.
    pub fn answered<T: Tree>(&mut self, here: &T, cuts: &[Cut]) -> Result<(), AnswerError<T::Error>> {
        let asked = std::mem::take(&mut self.asked);
        if cuts.is_empty() || cuts.len() > asked.len() {
            return Err(AnswerError::Protocol("an answer to another question"));
        }
        if let Some(whole) = here.whole().filter(|whole| asked == [Span::all()] && *cuts == [(*whole).clone()]) {
            self.entries = whole.parts.iter().map(|part| part.tally.entries).sum();
            return Ok(());
        }
        self.todo.extend_from_slice(&asked[cuts.len()..]);
        let mut parts = Vec::new();
        for (span, Cut { parts: theirs }) in asked.iter().zip(cuts) {
            let firsts: Vec<Vec<u8>> = theirs.iter().map(|part| part.first.clone()).collect();
            let is_in_order = firsts.windows(2).all(|two| two[0] < two[1]);
            if !is_in_order || !firsts.iter().all(|first| *first >= span.from && span.is_before_end(first)) {
                return Err(AnswerError::Protocol("parts that are not of the span that was asked about"));
            }
            if theirs.is_empty() {
                parts.push((span.clone(), None));
            }
            parts.extend(parts_of(span, &firsts).into_iter().zip(theirs.iter().map(Some)));
        }
        let (spans, theirs): (Vec<Span>, Vec<Option<&Part>>) = parts.into_iter().unzip();
        let ours = here.tallies(&spans).map_err(AnswerError::Store)?;
        if self.rounds == 1 {
            self.entries = ours.iter().map(|tally| tally.entries).sum();
        }
        for ((span, theirs), ours) in spans.into_iter().zip(theirs).zip(ours) {
            match theirs {
                Some(part) if part.tally == ours => {}
                None if ours.entries == 0 => {}
                Some(part) if part.tally.entries > 1 => self.todo.push(span),
                part => self.name(here, &span, part)?,
            }
        }
        Ok(())
    }

    /// What was found: how many entries were compared, where the trees differ, and whether there is more of that.
    pub fn finish(self) -> Found {
        Found { entries: self.entries, differences: self.differences, has_more: self.has_more }
    }

    /// Names what differs in a span in which the other side has one entry, or none.
    fn name<T: Tree>(&mut self, here: &T, span: &Span, theirs: Option<&Part>) -> Result<(), AnswerError<T::Error>> {
        let mut theirs = theirs.filter(|part| part.tally.entries == 1);
        let mut found = Vec::new();
        let mut is_cut_off = false;
        here.entries(span, &mut |key, entry| {
            if let Some(part) = theirs.filter(|part| *part.first <= *key) {
                if *part.first != *key {
                    found.push((part.first.clone(), How::OnlyThere));
                } else if part.tally.digest != digest_of(key, entry) {
                    found.push((key.to_vec(), How::Differs));
                }
                theirs = None;
                if *part.first == *key {
                    return true;
                }
            }
            is_cut_off = found.len() >= DIFFERENCES_MAX;
            if !is_cut_off {
                found.push((key.to_vec(), How::OnlyHere));
            }
            !is_cut_off
        })
        .map_err(AnswerError::Store)?;
        if let Some(part) = theirs.filter(|_| !is_cut_off) {
            found.push((part.first.clone(), How::OnlyThere));
        }
        self.has_more |= is_cut_off;
        for (key, how) in found {
            if self.differences.len() >= DIFFERENCES_MAX {
                self.has_more = true;
                break;
            }
            let (root, path) = key::decode(&key).map_err(|_| AnswerError::Protocol("a key that is none"))?;
            self.differences.push(Difference { root, path, how });
        }
        Ok(())
    }
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Entries that were compared, as the side that asked has them.
    pub entries: u64,
    /// At most [`DIFFERENCES_MAX`].
    pub differences: Vec<Difference>,
    /// Whether there are more.
    pub has_more: bool,
}

fn digest_of(key: &[u8], entry: &[u8]) -> Digest {
    let mut fingerprint = Fingerprint::default();
    fingerprint.add_encoded(key, entry);
    fingerprint.finish()
}

/// Gathers what is left out, in bounded memory.
#[derive(Debug, Default)]
pub struct Gather(BTreeMap<(RootId, RelPath), Extent>);

impl Gather {
    /// Leaves a path out.
    pub fn add(&mut self, root: RootId, path: RelPath, extent: Extent) {
        let known = self.0.entry((root, path)).or_insert(extent);
        *known = extent.max(*known);
        if self.0.len() > 4 * LEFT_OUT_MAX {
            self.shorten();
        }
    }

    /// All of it; at most [`LEFT_OUT_MAX`].
    pub fn finish(mut self) -> Vec<LeftOut> {
        self.shorten();
        self.0.into_iter().map(|((root, path), extent)| LeftOut { root, path, extent }).collect()
    }

    /// Leaves out the folders of the deepest paths instead of these, until it is little enough.
    fn shorten(&mut self) {
        loop {
            let covered =
                |(root, path): &(RootId, RelPath)| path.ancestors().any(|above| self.0.get(&(*root, above)) == Some(&Extent::All));
            let covered: BTreeSet<_> = self.0.keys().filter(|at| covered(at)).cloned().collect();
            self.0.retain(|at, _| !covered.contains(at));
            let bytes: usize = self.0.keys().map(|(_, path)| path.as_bytes().len()).sum();
            if self.0.len() <= LEFT_OUT_MAX && bytes <= LEFT_OUT_BYTES_MAX {
                return;
            }
            let depth = |path: &RelPath| if path.is_root() { 0 } else { path.components().count() };
            let deepest = self.0.keys().map(|(_, path)| depth(path)).max().unwrap_or(0);
            let deep: Vec<_> = self.0.keys().filter(|(_, path)| depth(path) == deepest).cloned().collect();
            for at in deep {
                self.0.remove(&at);
                self.0.insert((at.0, at.1.parent().unwrap_or_else(RelPath::root)), Extent::All);
            }
        }
    }
}

/// What is left out, as keys.
#[derive(Debug, Clone, Default)]
pub struct Without(Vec<std::ops::Range<Vec<u8>>>);

impl Without {
    /// All of `left_out`.
    pub fn new(left_out: &[LeftOut]) -> Without {
        let mut ranges = Vec::new();
        for LeftOut { root, path, extent } in left_out {
            let own = key::encode(*root, path);
            let mut next = own.clone();
            next.push(0);
            ranges.push(own..next);
            if *extent == Extent::All {
                ranges.extend([key::children(*root, path), key::deeper(*root, path)]);
            }
        }
        ranges.sort_by(|a, b| a.start.cmp(&b.start));
        let mut merged: Vec<std::ops::Range<Vec<u8>>> = Vec::new();
        for range in ranges {
            match merged.last_mut().filter(|last| range.start <= last.end) {
                Some(last) if range.end > last.end => last.end = range.end,
                Some(_) => {}
                None => merged.push(range),
            }
        }
        Without(merged)
    }

    /// Whether an entry takes part.
    pub fn takes_part(&self, key: &[u8]) -> bool {
        if seeded_bug!(LeftOutIsCompared) {
            return true;
        }
        let behind = self.0.partition_point(|range| range.start.as_slice() <= key);
        behind == 0 || self.0[behind - 1].end.as_slice() <= key
    }
}

/// Cuts a whole tree while it is gone over once.
#[derive(Debug)]
pub struct Cutter {
    every: u64,
    parts: Vec<Part>,
    entries: u64,
    fingerprint: Fingerprint,
}

impl Cutter {
    /// For a tree of about so many entries, or fewer: two sides that are nearly of one opinion about that cut alike.
    pub fn new(entries: u64) -> Cutter {
        Cutter {
            every: (entries / PARTS_MAX as u64 + 1).next_power_of_two(),
            parts: Vec::new(),
            entries: 0,
            fingerprint: Fingerprint::default(),
        }
    }

    /// Takes the next entry, in the order of keys.
    pub fn add(&mut self, key: &[u8], entry: &[u8]) {
        if self.entries.is_multiple_of(self.every) && self.parts.len() < PARTS_MAX {
            self.close();
            self.parts.push(Part { first: key.to_vec(), tally: Tally { entries: 0, digest: Digest([0; 32]) } });
        }
        self.fingerprint.add_encoded(key, entry);
        self.entries += 1;
    }

    /// All of the tree in parts.
    pub fn finish(mut self) -> Cut {
        self.close();
        Cut { parts: self.parts }
    }

    fn close(&mut self) {
        let before: u64 = self.parts.iter().rev().skip(1).map(|part| part.tally.entries).sum();
        if let Some(last) = self.parts.last_mut() {
            last.tally = Tally { entries: self.entries - before, digest: std::mem::take(&mut self.fingerprint).finish() };
        }
    }
}

#[cfg(test)]
mod tests;
