//! The commit graphs of a repository, which come in layers that a chain names: git merges and drops them at any moment,
//! so each folder of them is looked at once, when all else of the pass is done, and judged as a whole.
//!
//! Invariants: a chain is handed over, or stays, only when each layer that it names stays too or was handed over before
//! it; when objects go, none stays that may name them.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use coldspare_core::{ProblemKind, RelPath, RootId, seeded_bug};
use coldspare_os::{Disk, FileKind};

use crate::batch::Builder;
use crate::capture::CaptureError;
use crate::index::{Row, State};
use crate::links::is_linked;
use crate::read::Outcome;
use crate::run::{Claim, Run, Seen, lock};
use crate::unit::Unit;
use crate::visit::{Candidate, is_vanished};

/// Below a repository.
pub(crate) const FOLDER: &[u8] = b"objects/info/commit-graphs";
const CHAIN: &[u8] = b"commit-graph-chain";

/// A folder of commit graphs that was met.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GraphFolder {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    /// The filesystem that it is on.
    pub(crate) dev: u64,
}

/// What there is of a folder, and what the index knows of it.
struct Found {
    chain: Option<Candidate>,
    layers: Vec<Candidate>,
    /// What the index knows and the folder doesn't have.
    gone: Vec<(RelPath, Row)>,
}

/// What becomes of a layer on the standby with this changeset; of several the greatest counts for their chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    /// It is there.
    IsWhole,
    /// What is there of it stays; a later changeset brings it.
    ComesLater,
    /// It may name what is not there.
    IsUnfit,
}

/// What becomes of a chain on the standby with this changeset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chain {
    /// It names layers that are there.
    IsWhole,
    /// It stays as it is on the standby, and so does whatever it may name.
    StaysAsItWas,
    /// There is none, or it goes.
    IsGone,
}

impl<D: Disk> Run<'_, D> {
    /// Hands over the commit graphs of all folders that were met.
    pub(crate) fn capture_graphs(&self) -> Result<(), CaptureError> {
        let folders = std::mem::take(&mut *lock(&self.graphs));
        self.capture.pool.scope(|scope| {
            for folder in folders {
                scope.spawn(move |_| {
                    let mut builder = lock(&self.builders).pop().unwrap_or_default();
                    let result = self.capture_folder(&folder, &mut builder);
                    lock(&self.builders).push(builder);
                    if let Err(e) = result {
                        self.fail(e);
                    }
                });
            }
        });
        self.outcome()?;
        lock(&self.builders).iter_mut().try_for_each(|builder| self.flush(builder))
    }

    fn capture_folder(&self, folder: &GraphFolder, builder: &mut Builder) -> Result<(), CaptureError> {
        let Some(unit) = self.units.of(folder.root, &folder.path) else { return Ok(()) };
        let found = self.look_at_graphs(folder)?;
        let (mut layers, mut going) = (BTreeMap::new(), found.gone);
        for layer in found.layers {
            let (path, row) = (layer.path.clone(), layer.row.clone());
            let becomes = self.capture_layer(&unit, layer, builder)?;
            if becomes == Layer::IsUnfit {
                tracing::debug!(%path, "not carried: it may name what the standby lacks");
                going.extend(row.map(|row| (path.clone(), row)));
            }
            layers.insert(path, becomes);
        }
        let chain = match found.chain {
            Some(chain) => self.capture_chain(&unit, folder, chain, &layers, builder)?,
            None => Chain::IsGone,
        };
        for (path, row) in going {
            if path.name() != CHAIN && chain == Chain::StaysAsItWas {
                self.keep(folder.root, &path);
                self.again(folder.root, &path);
            } else {
                self.graph_goes(&unit, folder, path, &row, builder)?;
            }
        }
        Ok(())
    }

    /// What is in a folder; nothing when it went since it was met.
    fn look_at_graphs(&self, folder: &GraphFolder) -> Result<Found, CaptureError> {
        let GraphFolder { root, path, dev } = folder;
        let disk = &self.capture.disk;
        let at_ms = disk.now_ms();
        let listed = match disk.open_dir(&self.root(*root).dir, path.as_bytes()).and_then(|dir| disk.list_stat(&dir)) {
            Ok(listed) => listed,
            Err(e) => {
                if is_vanished(&e) {
                    self.again(*root, path); // from above
                } else {
                    self.hold(*root, path, ProblemKind::Unreadable, format!("the folder can't be examined: {e}"));
                }
                Vec::new()
            }
        };
        let mut known: BTreeMap<_, _> = self.snapshot.children(*root, path)?.into_iter().collect();
        self.counters.entries.fetch_add(listed.len() as u64, Ordering::Relaxed);
        let mut found = Found { chain: None, layers: Vec::new(), gone: Vec::new() };
        for (name, stat) in listed {
            let is_graph = stat.kind == FileKind::File && (*name == *CHAIN || name.ends_with(b".graph"));
            let Some(path) = self.carried(*root, path, &name, &stat).filter(|_| is_graph) else { continue };
            let candidate = Candidate { root: *root, path, stat, at_ms, row: known.remove(&name) };
            self.leave_links(*dev, &candidate)?;
            if *name == *CHAIN {
                found.chain = Some(candidate);
            } else {
                found.layers.push(candidate);
            }
        }
        found.layers.sort_by(|a, b| a.path.cmp(&b.path));
        for (name, row) in known {
            if let Ok(path) = path.join(&name) {
                found.gone.push((path, row));
            }
        }
        Ok(found)
    }

    fn capture_layer(&self, unit: &Unit, layer: Candidate, builder: &mut Builder) -> Result<Layer, CaptureError> {
        let (root, path, seen) = (layer.root, layer.path.clone(), layer.stat);
        let is_known = layer.row.as_ref().is_some_and(|row| self.has(row, &seen));
        if is_known && !unit.has_removed() {
            return Ok(Layer::IsWhole);
        }
        if !self.is_older_than_objects(&seen) {
            // It may name objects that came after they were read: the next changeset brings it.
            self.again(root, &path);
            if unit.has_removed() {
                return Ok(Layer::IsUnfit);
            }
            self.keep(root, &path);
            return Ok(Layer::ComesLater);
        }
        if !self.names_commits_that_are_there(unit, &path).unwrap_or(false) {
            return Ok(Layer::IsUnfit);
        }
        if is_known {
            return Ok(Layer::IsWhole);
        }
        if !self.is_graph_mine(unit, &layer, builder) {
            return Ok(Layer::ComesLater);
        }
        if is_linked(&seen, layer.row.as_ref()) {
            lock(&self.linked).push(layer);
            self.again(root, &path); // for its chain
            return Ok(Layer::ComesLater);
        }
        // Its name is the checksum of its content: whichever was read is it.
        Ok(match self.capture_one(layer, builder)? {
            Outcome::Same(_) | Outcome::Attributes(_) | Outcome::Content(_) => Layer::IsWhole,
            Outcome::Held => Layer::IsUnfit,
            Outcome::Vanished => {
                self.keep(root, &path);
                self.again(root, &path);
                Layer::ComesLater
            }
        })
    }

    fn capture_chain(
        &self,
        unit: &Unit,
        folder: &GraphFolder,
        chain: Candidate,
        layers: &BTreeMap<RelPath, Layer>,
        builder: &mut Builder,
    ) -> Result<Chain, CaptureError> {
        let (root, path, row, seen) = (chain.root, chain.path.clone(), chain.row.clone(), chain.stat);
        let named = self.layers_of(root, &path);
        let becomes = |layer: &RelPath| layers.get(layer).copied().unwrap_or(Layer::IsUnfit);
        let mut fitness = named.map_or(Layer::IsUnfit, |named| named.iter().map(becomes).max().unwrap_or(Layer::IsWhole));
        if seeded_bug!(LayersNeedNotBeThere) {
            fitness = Layer::IsWhole;
        }
        if fitness == Layer::IsWhole && row.as_ref().is_some_and(|row| self.has(row, &seen)) {
            return Ok(Chain::IsWhole);
        }
        if fitness == Layer::IsWhole && !self.is_older_than_objects(&seen) {
            fitness = Layer::ComesLater;
        }
        if fitness == Layer::ComesLater {
            self.again(root, &path);
        }
        if fitness == Layer::IsUnfit || fitness == Layer::ComesLater && unit.has_removed() {
            tracing::debug!(%path, "not carried: it may name what the standby lacks");
            if let Some(row) = row {
                self.graph_goes(unit, folder, path, &row, builder)?;
            }
            return Ok(Chain::IsGone);
        }
        if fitness == Layer::IsWhole && self.is_graph_mine(unit, &chain, builder) {
            if is_linked(&seen, row.as_ref()) {
                lock(&self.linked).push(chain);
                return Ok(Chain::IsWhole);
            }
            let outcome = self.capture_one(chain, builder)?;
            let is_as_seen = self.stat_of(root, &path).is_some_and(|now| (now.ino, now.ctime) == (seen.ino, seen.ctime));
            if is_as_seen && matches!(outcome, Outcome::Same(_) | Outcome::Attributes(_) | Outcome::Content(_)) {
                return Ok(Chain::IsWhole);
            }
            // Another than was looked into may have been read; what may be handed over already can't be replaced.
            if unit.has_removed() {
                unit.again("its commit graphs changed while they were read");
            }
            self.again(root, &path);
        }
        self.keep(root, &path);
        Ok(Chain::StaysAsItWas)
    }

    /// The layers that a chain names; `None` when it can't be read.
    fn layers_of(&self, root: RootId, chain: &RelPath) -> Option<Vec<RelPath>> {
        let (content, size) = self.head_of(root, chain, CHAIN_BYTES_MAX)?;
        if content.len() as u64 != size {
            return None;
        }
        let folder = chain.parent()?;
        let lines = content.split(|&b| b == b'\n').filter(|line| !line.is_empty());
        lines.map(|hash| folder.join(&[b"graph-", hash, b".graph"].concat()).ok()).collect()
    }

    /// Claims a graph that is to be handed over.
    fn is_graph_mine(&self, unit: &Unit, graph: &Candidate, builder: &mut Builder) -> bool {
        let is_mine = self.claim_entry(graph.root, &graph.path, &Seen::from(&graph.stat), builder) == Claim::Mine;
        if is_mine {
            unit.count_op();
        } else {
            self.again(graph.root, &graph.path);
        }
        is_mine
    }

    /// Hands over that a graph is gone on the standby, if it may be there.
    fn graph_goes(&self, unit: &Unit, folder: &GraphFolder, path: RelPath, row: &Row, builder: &mut Builder) -> Result<(), CaptureError> {
        let is_news = matches!(row.state, State::Present { .. }) || row.version == Row::UNSENT;
        if !is_news && row.version <= self.acked {
            return Ok(());
        }
        if self.claim_entry(folder.root, &path, &Seen::Gone, builder) != Claim::Mine {
            self.again(folder.root, &path);
            return Ok(());
        }
        self.leave_links_of(folder.root, folder.dev, &path, row)?;
        self.capture.held.forget_within(folder.root, &path);
        unit.count_op();
        self.remove(folder.root, path, is_news, builder)
    }
}

/// LIMIT: bytes of a chain; a longer one isn't carried.
const CHAIN_BYTES_MAX: usize = 1 << 20;
