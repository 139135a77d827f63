"""The commands: preparing data, training, evaluating and recommending. Each file in recipes/ starts one of them."""
