"""The board's words, in each of its languages: of the fields (label, hint), the losses, and the alerts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
Field = tuple[str, str]

FIELDS: dict[str, dict[str, Field]] = {
    "en": {
        "dpop_lambda": ("DPOP lambda", "Weight of the penalty on a chosen answer below the reference."),
        "sr_lambda": ("Refinement lambda", "Weight of the refinement term; 0 switches it off."),
        "sr_prompt": ("Refinement prompt", "Put in front of the query for the refinement term."),
        "ipo_length_normalize": ("Means per token", "Compare means per token (true) or sums over the answer (false)."),
        "pref_loss_args": ("Loss arguments", "Keyword arguments of your loss, as JSON."),
        "share_prefix": ("Share prefix", "Compute what both answers begin with once; auto: where that is exact."),
        "precompute_ref_log_probs": (
            "Reference cache",
            "Compute the reference once before training and keep it on disk; auto: where that is exact.",
        ),
        "ref_log_probs_cache_dir": ("Reference cache folder", "Empty: in the user's cache folder."),
        "pref_loss_file": (
            "Loss file",
            "Python file that registers a loss of yours, in a folder that the board may read; Enter reads it.",
        ),
        "pref_stop_on_degeneration": ("Stop on degeneration", "End a run that degenerates, after a checkpoint."),
        "reward_viewer": ("Normalized rewards", ""),
    },
    "ru": {
        "dpop_lambda": ("Лямбда DPOP", "Вес штрафа за выбранный ответ, ставший менее вероятным, чем у эталона."),
        "sr_lambda": ("Лямбда уточнения", "Вес уточняющего слагаемого; 0 отключает его."),
        "sr_prompt": ("Промпт уточнения", "Ставится перед запросом для уточняющего слагаемого."),
        "ipo_length_normalize": (
            "Средние по токенам",
            "Сравнивать средние по токенам (true) или суммы по ответу (false).",
        ),
        "pref_loss_args": ("Аргументы функции потерь", "Именованные аргументы вашей функции потерь в формате JSON."),
        "share_prefix": (
            "Общий префикс",
            "Вычислять общее начало обоих ответов один раз; auto: там, где это точно.",
        ),
        "precompute_ref_log_probs": (
            "Кэш эталонной модели",
            "Вычислить эталон один раз до обучения и хранить на диске; auto: там, где это точно.",
        ),
        "ref_log_probs_cache_dir": ("Папка кэша эталона", "Пусто: в папке кэша пользователя."),
        "pref_loss_file": (
            "Файл функции потерь",
            "Файл Python, регистрирующий вашу функцию потерь, в папке, доступной панели; читается по Enter.",
        ),
        "pref_stop_on_degeneration": (
            "Остановка при вырождении",
            "Завершить вырождающееся обучение после контрольной точки.",
        ),
        "reward_viewer": ("Нормированные награды", ""),
    },
    "zh": {
        "dpop_lambda": ("DPOP lambda", "被选回答的概率低于参考模型时的惩罚权重。"),
        "sr_lambda": ("修正项 lambda", "修正项的权重；0 表示关闭。"),
        "sr_prompt": ("修正项提示词", "计算修正项时加在问题之前的文本。"),
        "ipo_length_normalize": ("按词元取平均", "比较每个词元的平均值（true）或整个回答的总和（false）。"),
        "pref_loss_args": ("损失函数参数", "自定义损失函数的关键字参数，JSON 格式。"),
        "share_prefix": ("共享前缀", "两个回答的相同开头只计算一次；auto：在结果精确时启用。"),
        "precompute_ref_log_probs": (
            "参考模型缓存",
            "训练前一次性计算参考模型并保存到磁盘；auto：在结果精确时启用。",
        ),
        "ref_log_probs_cache_dir": ("参考缓存目录", "留空：用户缓存目录。"),
        "pref_loss_file": (
            "损失函数文件",
            "注册自定义损失函数的 Python 文件，须位于允许面板读取的文件夹；按回车读取。",
        ),
        "pref_stop_on_degeneration": ("退化时停止", "训练退化时保存检查点并停止。"),
        "reward_viewer": ("归一化奖励", ""),
    },
    "ko": {
        "dpop_lambda": ("DPOP 람다", "선택된 답변의 확률이 참조 모델보다 낮을 때의 페널티 가중치."),
        "sr_lambda": ("개선 항 람다", "개선 항의 가중치. 0이면 사용하지 않습니다."),
        "sr_prompt": ("개선 항 프롬프트", "개선 항을 계산할 때 질문 앞에 붙이는 문장."),
        "ipo_length_normalize": ("토큰당 평균", "토큰당 평균(true) 또는 답변 전체의 합(false)을 비교합니다."),
        "pref_loss_args": ("로스 인수", "사용자 로스 함수의 키워드 인수 (JSON)."),
        "share_prefix": ("접두사 공유", "두 답변의 공통 시작 부분을 한 번만 계산합니다. auto: 결과가 정확한 경우."),
        "precompute_ref_log_probs": (
            "참조 모델 캐시",
            "학습 전에 참조 모델을 한 번 계산해 디스크에 저장합니다. auto: 결과가 정확한 경우.",
        ),
        "ref_log_probs_cache_dir": ("참조 캐시 폴더", "비워 두면 사용자 캐시 폴더."),
        "pref_loss_file": (
            "로스 파일",
            "사용자 로스를 등록하는 Python 파일. 보드가 읽도록 허용된 폴더에 두고 Enter로 읽습니다.",
        ),
        "pref_stop_on_degeneration": ("퇴화 시 중지", "퇴화하는 학습을 체크포인트 저장 후 종료합니다."),
        "reward_viewer": ("정규화된 보상", ""),
    },
    "ja": {
        "dpop_lambda": ("DPOP ラムダ", "選ばれた回答の確率が参照モデルを下回ったときのペナルティの重み。"),
        "sr_lambda": ("改善項のラムダ", "改善項の重み。0 で無効になります。"),
        "sr_prompt": ("改善項のプロンプト", "改善項を計算するときに質問の前に付ける文。"),
        "ipo_length_normalize": ("トークン平均", "トークンごとの平均（true）か回答全体の和（false）を比較します。"),
        "pref_loss_args": ("損失関数の引数", "独自の損失関数のキーワード引数（JSON）。"),
        "share_prefix": ("接頭部の共有", "両方の回答に共通する先頭を一度だけ計算します。auto：結果が正確な場合。"),
        "precompute_ref_log_probs": (
            "参照キャッシュ",
            "学習前に参照モデルを一度だけ計算しディスクに保存します。auto：結果が正確な場合。",
        ),
        "ref_log_probs_cache_dir": ("参照キャッシュのフォルダ", "空欄：ユーザーのキャッシュフォルダ。"),
        "pref_loss_file": (
            "損失関数ファイル",
            "独自の損失関数を登録する Python ファイル。ボードに許可されたフォルダに置き、Enter で読み込みます。",
        ),
        "pref_stop_on_degeneration": ("退化時に停止", "退化した学習をチェックポイント保存後に終了します。"),
        "reward_viewer": ("正規化報酬", ""),
    },
}

LOSSES: dict[str, dict[str, str]] = {
    "en": {
        "sigmoid": "DPO: pushes the rejected answer down relative to the chosen one, without end.",
        "hinge": "SLiC: like DPO, but a pair counts no more once its margin is 1/beta.",
        "ipo": "IPO: draws the margin per token towards 1/(2 beta), so that it cannot grow without bound.",
        "kto_pair": "Pairwise KTO: chosen and rejected answers each against the batch's mean divergence.",
        "orpo": "ORPO: fine-tuning with an odds-ratio term; needs no reference model.",
        "simpo": "SimPO: likelihood per token with a target margin; needs no reference model.",
        "minor_dpo": "MinorDPO: a rejected answer is pushed down only while it is likelier than under the reference.",
        "dpop": "DPO-Positive: DPO with a penalty where a chosen answer falls below the reference.",
        "sr_dpo": "Sr-DPO: DPO whose target margin is refined by the model's own judgement under a quality prompt.",
        "sr_ipo": "Sr-IPO: IPO whose target margin is refined by the model's own judgement under a quality prompt.",
    },
    "ru": {
        "sigmoid": "DPO: неограниченно понижает отвергнутый ответ относительно выбранного.",
        "hinge": "SLiC: как DPO, но пара больше не учитывается, когда отрыв достигает 1/beta.",
        "ipo": "IPO: приближает отрыв на токен к 1/(2 beta), чтобы он не рос без предела.",
        "kto_pair": "Парный KTO: выбранный и отвергнутый ответы сравниваются со средним расхождением пакета.",
        "orpo": "ORPO: дообучение с членом отношения шансов; эталонная модель не нужна.",
        "simpo": "SimPO: правдоподобие на токен с целевым отрывом; эталонная модель не нужна.",
        "minor_dpo": "MinorDPO: отвергнутый ответ понижается, только пока он вероятнее, чем у эталонной модели.",
        "dpop": "DPO-Positive: DPO со штрафом, если выбранный ответ становится менее вероятным, чем у эталона.",
        "sr_dpo": "Sr-DPO: DPO, где целевой отрыв уточняется оценкой самой модели при запросе качества.",
        "sr_ipo": "Sr-IPO: IPO, где целевой отрыв уточняется оценкой самой модели при запросе качества.",
    },
    "zh": {
        "sigmoid": "DPO：相对被选回答不断压低被拒回答，没有上限。",
        "hinge": "SLiC：类似 DPO，但间隔达到 1/beta 后该样本不再起作用。",
        "ipo": "IPO：使每个词元的间隔趋近 1/(2 beta)，避免无限增大。",
        "kto_pair": "成对 KTO：被选与被拒回答分别与批内平均散度比较。",
        "orpo": "ORPO：带几率比项的微调，不需要参考模型。",
        "simpo": "SimPO：带目标间隔的逐词元似然，不需要参考模型。",
        "minor_dpo": "MinorDPO：仅当被拒回答比参考模型下更可能时才压低它。",
        "dpop": "DPO-Positive：在 DPO 上对概率低于参考模型的被选回答加以惩罚。",
        "sr_dpo": "Sr-DPO：用模型在质量提示下的自我判断修正目标间隔的 DPO。",
        "sr_ipo": "Sr-IPO：用模型在质量提示下的自我判断修正目标间隔的 IPO。",
    },
    "ko": {
        "sigmoid": "DPO: 선택된 답변에 비해 거부된 답변을 제한 없이 낮춥니다.",
        "hinge": "SLiC: DPO와 같지만 마진이 1/beta에 이르면 그 쌍은 더 이상 반영되지 않습니다.",
        "ipo": "IPO: 토큰당 마진을 1/(2 beta)로 끌어당겨 무한히 커지지 않게 합니다.",
        "kto_pair": "쌍 단위 KTO: 선택·거부 답변을 각각 배치의 평균 발산과 비교합니다.",
        "orpo": "ORPO: 오즈비 항을 더한 미세 조정. 참조 모델이 필요 없습니다.",
        "simpo": "SimPO: 목표 마진을 둔 토큰당 우도. 참조 모델이 필요 없습니다.",
        "minor_dpo": "MinorDPO: 거부된 답변이 참조 모델에서보다 더 그럴듯할 때만 낮춥니다.",
        "dpop": "DPO-Positive: 선택된 답변이 참조 모델보다 낮아지면 페널티를 주는 DPO.",
        "sr_dpo": "Sr-DPO: 품질을 요구하는 프롬프트에서 모델 스스로의 판단으로 목표 마진을 다듬는 DPO.",
        "sr_ipo": "Sr-IPO: 품질을 요구하는 프롬프트에서 모델 스스로의 판단으로 목표 마진을 다듬는 IPO.",
    },
    "ja": {
        "sigmoid": "DPO：選ばれた回答に対して拒否された回答を際限なく下げます。",
        "hinge": "SLiC：DPO と同様ですが、マージンが 1/beta に達したペアは影響しなくなります。",
        "ipo": "IPO：トークンあたりのマージンを 1/(2 beta) に近づけ、際限なく大きくならないようにします。",
        "kto_pair": "ペア単位の KTO：両方の回答をそれぞれバッチの平均ダイバージェンスと比べます。",
        "orpo": "ORPO：オッズ比の項を加えたファインチューニング。参照モデルは不要です。",
        "simpo": "SimPO：目標マージン付きのトークンあたり尤度。参照モデルは不要です。",
        "minor_dpo": "MinorDPO：拒否された回答が参照モデルより起こりやすい間だけ下げます。",
        "dpop": "DPO-Positive：選ばれた回答が参照モデルを下回るとペナルティを加える DPO。",
        "sr_dpo": "Sr-DPO：品質を求めるプロンプトでのモデル自身の判断により目標マージンを調整する DPO。",
        "sr_ipo": "Sr-IPO：品質を求めるプロンプトでのモデル自身の判断により目標マージンを調整する IPO。",
    },
}

ALERTS: dict[str, dict[str, str]] = {
    "en": {
        "fallen": "Chosen answers become unlikely together with rejected ones: the run degenerates.",
        "not_a_number": "Log-probabilities are not numbers any more: the run has degenerated.",
        "stopped": "Stop on degeneration ended it at step {step} of {total}, after a checkpoint.",
        "remedies": "Try MinorDPO or DPOP, a larger beta, or a smaller learning rate.",
        "twice": "`{key}` stands in its field and in the extra arguments: clear one of them.",
    },
    "ru": {
        "fallen": "Выбранные ответы становятся маловероятными вместе с отвергнутыми: обучение вырождается.",
        "not_a_number": "Логарифмы вероятностей перестали быть числами: обучение выродилось.",
        "stopped": "«Остановка при вырождении» завершила его на шаге {step} из {total} после контрольной точки.",
        "remedies": "Попробуйте MinorDPO или DPOP, большее beta или меньшую скорость обучения.",
        "twice": "`{key}` указан и в своём поле, и в дополнительных аргументах: оставьте одно из двух.",
    },
    "zh": {
        "fallen": "被选回答与被拒回答的概率一起大幅下降：训练正在退化。",
        "not_a_number": "对数概率已不再是有效数值：训练已经退化。",
        "stopped": "“退化时停止”已在第 {step} 步（共 {total} 步）保存检查点并结束训练。",
        "remedies": "请尝试 MinorDPO 或 DPOP、更大的 beta 或更小的学习率。",
        "twice": "`{key}` 同时出现在其输入框和额外参数中：请清除其一。",
    },
    "ko": {
        "fallen": "선택된 답변이 거부된 답변과 함께 가능성이 낮아지고 있습니다. 학습이 퇴화하고 있습니다.",
        "not_a_number": "로그 확률이 더 이상 숫자가 아닙니다. 학습이 퇴화했습니다.",
        "stopped": "‘퇴화 시 중지’ 설정에 따라 전체 {total}단계 중 {step}단계에서 체크포인트를 저장하고 종료했습니다.",
        "remedies": "MinorDPO나 DPOP, 더 큰 beta, 더 작은 학습률을 시도해 보십시오.",
        "twice": "`{key}`이(가) 입력란과 추가 인수에 모두 있습니다. 하나를 지우십시오.",
    },
    "ja": {
        "fallen": "選ばれた回答が拒否された回答とともに起こりにくくなっています。学習が退化しています。",
        "not_a_number": "対数確率が数値ではなくなりました。学習が退化しました。",
        "stopped": "「退化時に停止」により {total} 中 {step} ステップで終了しました（チェックポイント保存済み）。",
        "remedies": "MinorDPO や DPOP、より大きな beta、より小さな学習率を試してください。",
        "twice": "`{key}` が入力欄と追加引数の両方にあります。どちらかを消してください。",
    },
}


def alert(name: str, lang: str) -> str:
    return _in(lang, ALERTS)[name]


def about_loss(name: str, lang: str) -> str | None:
    """What one of the package's losses does; None for a user's."""
    return _in(lang, LOSSES).get(name)


def locales(langs: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The fields' words as LLaMA-Factory's `LOCALES` has them: component -> language -> its properties."""
    return {name: {lang: _properties(*_in(lang, FIELDS)[name]) for lang in langs} for name in FIELDS["en"]}


def _properties(label: str, hint: str) -> dict[str, str]:
    return {"label": label, "info": hint} if hint else {"label": label}


def _in(lang: str, texts: Mapping[str, T]) -> T:
    return texts.get(lang, texts["en"])
