//! The state of an open round's body as one record, so that a long round's journal does not grow without end.

use std::collections::BTreeMap;

use experiment::hex;
use model::{AdamW, Adapter, Gradients, ModelError};

use planted::Bug;

use super::{Barrier, Worker};
use crate::journal::{BodyState, Entry, MemberState, Record};
use crate::round::ParticipantName;

impl Worker {
    /// None where no round is open.
    pub(super) fn snapshot(&self) -> Option<Entry> {
        let round = self.round.as_ref()?;
        let mut tensors = Vec::new();
        let mut keep = |adapter: &Adapter| tensors.extend(adapter.tensors().iter().map(|tensor| tensor.values.clone()));
        if let Some(shared) = &round.shared {
            keep(&shared.adapter);
            shared.before.iter().for_each(&mut keep);
        }
        for member in round.members.values() {
            member.own.iter().for_each(|(own, _)| keep(own));
            member.before.iter().for_each(&mut keep);
        }
        let shared = round.shared.as_ref().filter(|_| !planted::is(Bug::SnapshotsWithoutCommits));
        let committed = shared.map(|shared| &shared.committed);
        let members = round.members.iter().map(|(name, member)| {
            let gradients = committed.and_then(|committed| committed.get(name));
            let commits = round.shared.as_ref().and_then(|shared| shared.barrier.commit_of(name));
            tensors.extend(gradients.into_iter().flat_map(Gradients::tensors).cloned());
            MemberState {
                participant: name.to_string(),
                step: member.step,
                tokens: member.tokens.iter().map(|(step, tokens)| [*step, *tokens]).collect(),
                digest: member.digest.as_ref().map(|digest| hex(digest)),
                own: member.own.is_some(),
                before: member.before.is_some(),
                committed: commits.filter(|_| gradients.is_some()),
            }
        });
        let members = members.collect();
        let mut optimizers = Vec::new();
        for (name, optimizer) in &self.optimizers {
            let (steps, first, second) = optimizer.state();
            optimizers.push((name.clone(), steps));
            tensors.extend(first.iter().chain(second).cloned());
        }
        let shared = round.shared.as_ref();
        let state = BodyState {
            members,
            open_step: shared.map(|shared| shared.barrier.open_step()),
            before: shared.is_some_and(|shared| shared.before.is_some()),
            optimizers,
        };
        Some(Entry { record: Record::Body { state }, tensors })
    }

    /// The round that has just been opened becomes what it was.
    pub(super) fn restore(&mut self, state: BodyState, tensors: Vec<Vec<f32>>) -> Result<(), ModelError> {
        let Some(round) = self.round.as_mut() else { return Ok(()) };
        let count = round.global.tensors().len();
        let mut tensors = tensors.into_iter();
        let mut take = || tensors.by_ref().take(count).collect::<Vec<_>>();
        if let (Some(shared), Some(_)) = (&mut round.shared, state.open_step) {
            shared.adapter = round.global.with_tensors(take())?;
            shared.lora = self.stage.attach(&shared.adapter)?;
            shared.before = if state.before { Some(round.global.with_tensors(take())?) } else { None };
        }
        // Who is not in it was removed before.
        round.members.retain(|name, _| state.members.iter().any(|member| member.participant == name.as_str()));
        let mut commits = BTreeMap::new();
        for kept in &state.members {
            let name = ParticipantName::new(&kept.participant);
            let Some(member) = round.members.get_mut(&name) else { continue };
            member.step = kept.step;
            member.tokens = kept.tokens.iter().map(|[step, tokens]| (*step, *tokens)).collect();
            member.digest = kept.digest.as_deref().and_then(digest_from);
            if kept.own {
                let own = round.global.with_tensors(take())?;
                let lora = self.stage.attach(&own)?;
                member.own = Some((own, lora));
            }
            member.before = if kept.before { Some(round.global.with_tensors(take())?) } else { None };
            commits.insert(name, kept.committed);
        }
        if let (Some(shared), Some(open_step)) = (&mut round.shared, state.open_step) {
            for (name, _) in commits.iter().filter(|(_, committed)| committed.is_some()) {
                shared.committed.insert(name.clone(), Gradients::new(take()));
            }
            let end = round.first_step + self.experiment.federation.local_steps;
            shared.barrier = Barrier::restored(commits, open_step, end);
        }
        self.optimizers.clear();
        for (name, steps) in state.optimizers {
            let mut optimizer = AdamW::new(&self.experiment.training, &round.global);
            optimizer.restore(steps, take(), take())?;
            self.optimizers.insert(name, optimizer);
        }
        Ok(())
    }
}

fn digest_from(text: &str) -> Option<[u8; 32]> {
    let digits = (0..64).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok());
    digits.collect::<Option<Vec<u8>>>()?.try_into().ok()
}
