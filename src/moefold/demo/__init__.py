"""The main job: a real encoder becomes a mixture of experts and is trained beside its dense twin."""
