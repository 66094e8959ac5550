//! The end of a run that collects importance matrices: who is asked, what comes, and where it is kept.
//!
//! A device's file holds the sums of all blocks over its tokens: its own, and those of the body, which were summed here.

use std::collections::BTreeSet;

use model::ChannelSums;
use quant::Imatrix;
use tokio::sync::oneshot;
use wire::{FromCoordinator, MEASURING_MINOR, RefusalReason, UpdateReply};

use super::super::RunError;
use super::Conductor;
use crate::body::RoundKey;
use crate::round::{Action, Event, ParticipantName, SumsRefusal, measuring_round};
use crate::serve::Incoming;

/// Whose sums are waited for, and whose are here.
#[derive(Default)]
pub(super) struct Measuring {
    asked: BTreeSet<ParticipantName>,
    kept: BTreeSet<ParticipantName>,
    declined: BTreeSet<ParticipantName>,
}

/// Sums whose fate the round machine is deciding.
pub(super) struct JudgedSums {
    sums: Result<ChannelSums, (RefusalReason, String)>,
    answer: oneshot::Sender<UpdateReply>,
}

impl Conductor {
    /// Asks for sums. Whoever speaks an older minor version is not asked, nor whose sums a coordinator has kept that was
    /// here before.
    pub(super) async fn measure(&mut self, participants: Vec<ParticipantName>) -> Result<Vec<Action>, RunError> {
        let federation = &self.shared.experiment.federation;
        let (round, rounds, local_steps) = (measuring_round(federation), federation.rounds, federation.local_steps);
        if self.measuring.is_none() {
            self.watcher.evaluated();
            let first_step = u64::from(rounds).saturating_mul(local_steps);
            self.publish(RoundKey { round, attempt: 1 }, participants.clone(), first_step).await;
            self.measuring = Some(Measuring::default());
        }
        let mut actions = Vec::new();
        for participant in participants {
            let is_kept = self.is_kept(&participant);
            let measuring = self.measuring.get_or_insert_default();
            measuring.asked.insert(participant.clone());
            let minor = self.connections.get(&participant).map(|connected| connected.minor);
            if is_kept {
                measuring.kept.insert(participant.clone());
            } else if minor.is_none_or(|minor| minor >= MEASURING_MINOR) {
                self.set_state(&participant, "measuring");
                self.send(&participant, FromCoordinator::Measure { round }).await;
                continue;
            } else {
                self.watcher.note(&format!("{participant} is too old to measure for an importance matrix; update it"));
            }
            actions.extend(self.handle(Event::NothingToMeasure { participant }));
        }
        self.state = "measuring".into();
        self.write_status(true)?;
        Ok(actions)
    }

    /// A device that was asked will not measure.
    pub(super) fn cannot_measure(&mut self, participant: ParticipantName, reason: &str) -> Option<Event> {
        let measuring = self.measuring.as_mut().filter(|measuring| measuring.asked.contains(&participant))?;
        // Said again it is no news.
        if !measuring.declined.insert(participant.clone()) {
            return None;
        }
        self.watcher.note(&format!("{participant} does not measure for an importance matrix: {reason}"));
        Some(Event::NothingToMeasure { participant })
    }

    /// The event of what has come.
    pub(super) fn sums_arrived(&self, incoming: Incoming) -> Option<(Event, JudgedSums)> {
        let Incoming::ChannelSums { participant, session, sums, answer } = incoming else { return None };
        if self.connections.get(&participant).is_none_or(|connected| connected.session != session) {
            return None;
        }
        let event = match &sums {
            Ok(_) => Event::SumsArrived { participant },
            Err(_) => Event::SumsRejected { participant },
        };
        Some((event, JudgedSums { sums, answer }))
    }

    /// Keeps a device's sums, as soon as the disk takes them, and then says so.
    pub(super) async fn accept_sums(
        &mut self,
        participant: ParticipantName,
        judged: JudgedSums,
    ) -> Result<(), RunError> {
        let JudgedSums { sums, answer } = judged;
        let Ok(sums) = sums else { return Ok(()) };
        let imatrix = sums.imatrix(self.dataset(&participant)).and_then(|imatrix| imatrix.to_bytes());
        let bytes = match imatrix {
            Ok(bytes) => bytes,
            // One matrix' sums may be at the end of what a number holds.
            Err(error) => {
                let (reason, text) = (RefusalReason::WrongSums, format!("the channel sums cannot be kept: {error}"));
                self.refuse_sums_as(&participant, answer, reason, text);
                return Ok(());
            }
        };
        loop {
            let written = offload::in_place(|| self.directory.write_imatrix(participant.as_str(), &bytes));
            match written.map_err(RunError::from) {
                Err(error) if error.may_pass() => self.wait_for_disk(error).await?,
                written => break written?,
            }
        }
        self.trouble = None;
        self.note_storage()?;
        let tokens = sums.tokens().unwrap_or(0);
        self.watcher.note(&format!("{participant} has sent its channel sums over {tokens} tokens"));
        let _ = answer.send(UpdateReply::Accepted);
        self.set_state(&participant, "measured");
        self.measuring.get_or_insert_default().kept.insert(participant);
        Ok(())
    }

    pub(super) fn refuse_sums(&mut self, participant: &ParticipantName, refusal: SumsRefusal, judged: JudgedSums) {
        let (reason, text) = match judged.sums {
            Err(content) => content,
            Ok(_) => (RefusalReason::Late, refusal.to_string()),
        };
        self.refuse_sums_as(participant, judged.answer, reason, text);
    }

    fn refuse_sums_as(
        &mut self,
        participant: &ParticipantName,
        answer: oneshot::Sender<UpdateReply>,
        reason: RefusalReason,
        text: String,
    ) {
        self.watcher.note(&format!("channel sums of {participant} are refused: {text}"));
        let _ = answer.send(UpdateReply::Refused { reason, text });
    }

    /// Says at the end of the run what there is and whose is missing.
    pub(super) fn note_measured(&mut self) {
        let Some(Measuring { asked, kept, .. }) = &self.measuring else { return };
        let missing: Vec<&str> = asked.difference(kept).map(ParticipantName::as_str).collect();
        let of = format!("importance matrices of {} of {} devices are in", kept.len(), asked.len());
        let directory = self.directory.imatrix_directory();
        self.watcher.note(&match missing[..] {
            [] => format!("{of} {}", directory.display()),
            _ => format!("{of} {}; none of {}", directory.display(), missing.join(", ")),
        });
    }

    /// Whether this device's sums of this run's end are on disk.
    fn is_kept(&self, participant: &ParticipantName) -> bool {
        let found = Imatrix::open(&self.directory.imatrix_path(participant.as_str()));
        found.is_ok_and(|found| found.datasets == [self.dataset(participant)])
    }

    /// Tells this run's files from those that devices' owners have made.
    fn dataset(&self, participant: &ParticipantName) -> String {
        let experiment = &self.shared.experiment;
        let rounds = experiment.federation.rounds;
        format!("training records of {participant} behind round {rounds} of {}", experiment.name)
    }
}
