//! A look at everything, where the standby has what the index says: while repositories are looked for, all that is
//! outside of them is compared with the index. What differs is visited as if it were hinted; of the rest, which is
//! nearly all, nothing is looked at twice.
//!
//! Invariants: a folder below which anything is visited by its name is one that the standby has.

use std::collections::BTreeMap;
use std::sync::Mutex;

use coldspare_core::git::{self, CapturePass};
use coldspare_core::{RelPath, RootId, seeded_bug};
use coldspare_os::{Disk, FileKind, Stat};

use crate::capture::CaptureError;
use crate::dirty::Hint;
use crate::discover::kind_of;
use crate::index::{Row, State};
use crate::run::{Run, lock};
use crate::visit::{Visit, What, is_unchanged};

/// What differed so far.
#[derive(Debug, Default)]
pub(crate) struct Survey(Mutex<Differing>);

#[derive(Debug, Default)]
struct Differing {
    visits: Vec<Visit>,
    names: usize,
}

/// LIMIT: names that are visited one by one; when more differ, everything is looked at folder by folder.
const NAMES_MAX: usize = 4_096;

impl Survey {
    /// Notes what is to be looked at once references and objects were read; nothing more once that is too much.
    fn note(&self, visit: Visit) {
        let mut differing = lock(&self.0);
        differing.names += match &visit.what {
            What::Names(names) => names.len().max(1),
            What::Deep => 1,
        };
        if differing.names <= NAMES_MAX {
            differing.visits.push(visit);
        } else {
            differing.visits = Vec::new();
        }
    }

    /// What is to be looked at; `None` when that is too much to be kept.
    fn into_visits(self) -> Option<Vec<Visit>> {
        let differing = self.0.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        (differing.names <= NAMES_MAX).then_some(differing.visits)
    }
}

impl<D: Disk> Run<'_, D> {
    /// Registers every repository of all roots, and leaves what else differs from the index to the last pass.
    ///
    /// Cost: outside of repositories one `getdents` pass, one `statx` an entry, and the rows.
    pub(crate) fn survey_everything(&self) -> Result<(), CaptureError> {
        let survey = Survey::default();
        let roots = (0..self.capture.roots.len()).map(crate::capture::root_id);
        self.capture.pool.scope(|scope| {
            for root in roots.clone() {
                let survey = &survey;
                scope.spawn(move |scope| self.survey_root(scope, survey, root));
            }
        });
        self.outcome()?;
        match survey.into_visits() {
            Some(visits) => {
                self.by_name.store(true, std::sync::atomic::Ordering::Relaxed);
                visits.into_iter().for_each(|visit| self.defer(CapturePass::Rest, visit));
            }
            None => roots.for_each(|root| self.defer(CapturePass::Rest, Visit::deep(root, RelPath::root()))),
        }
        Ok(())
    }

    fn survey_root<'s>(&'s self, scope: &rayon::Scope<'s>, survey: &'s Survey, root: RootId) {
        match self.snapshot.row(root, &RelPath::root()) {
            Ok(Some(row)) if row.is_dir() && row.version <= self.acked => self.survey(scope, survey, root, RelPath::root(), row),
            Ok(_) => {
                survey.note(Visit::deep(root, RelPath::root()));
                self.discover(scope, root, RelPath::root());
            }
            Err(e) => self.fail(e.into()),
        }
    }

    /// Compares the folder `dir`, which the standby has as `row` says, and all below it.
    fn survey<'s>(&'s self, scope: &rayon::Scope<'s>, survey: &'s Survey, root: RootId, dir: RelPath, row: Row) {
        if self.is_stopped() {
            return;
        }
        self.cover(root, &dir);
        let disk = &self.capture.disk;
        let opened = disk.open_dir(&self.root(root).dir, dir.as_bytes());
        let Ok((stat, listed)) = opened.and_then(|open| Ok((disk.stat_dir(&open)?, disk.list_stat(&open)?))) else {
            return survey.note(Visit::deep(root, dir)); // the visit tells why
        };
        if git::is_repository(listed.iter().map(|(name, stat)| (&name[..], kind_of(stat.kind)))) {
            self.register_full((root, dir.clone()));
            return survey.note(Visit::deep(root, dir));
        }
        self.counters.entries.fetch_add(listed.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let mut known: BTreeMap<Box<[u8]>, Row> = match self.snapshot.children(root, &dir) {
            Ok(rows) => rows.into_iter().collect(),
            Err(e) => return self.fail(e.into()),
        };
        let mut differing = BTreeMap::new();
        for (name, stat) in listed {
            let row = known.remove(&name);
            let Some(path) = self.carried(root, &dir, &name, &stat) else {
                differing.extend(row.map(|_| (name, Hint::Changed)));
                continue;
            };
            match row {
                Some(row) if stat.kind == FileKind::Dir && row.is_dir() && row.ino() == Some(stat.ino) && row.version <= self.acked => {
                    scope.spawn(move |scope| self.survey(scope, survey, root, path, row));
                }
                Some(row) if stat.kind != FileKind::Dir && self.has(&row, &stat) => {}
                _ => {
                    if stat.kind == FileKind::Dir {
                        scope.spawn(move |scope| self.discover(scope, root, path));
                    }
                    differing.insert(name, Hint::Replaced);
                }
            }
        }
        let is_news = |row: &Row| matches!(row.state, State::Present { .. }) || row.version > self.acked;
        differing.extend(known.into_iter().filter(|(_, row)| is_news(row)).map(|(name, _)| (name, Hint::Replaced)));
        if !differing.is_empty() || !self.has(&row, &stat) {
            survey.note(Visit { root, path: dir, what: What::Names(differing) });
        }
    }

    /// Whether the standby has, or will have before this changeset, what `stat` tells of.
    pub(crate) fn has(&self, row: &Row, stat: &Stat) -> bool {
        (row.version <= self.acked || seeded_bug!(UnacknowledgedCountsAsSent)) && is_unchanged(row, stat)
    }
}
